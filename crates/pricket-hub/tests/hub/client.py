"""Runs Python's client for the tests: `client.py MODE ID REVISION`. Environment variables set the server and the cache."""

import hashlib
import json
import sys
from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi, hf_hub_download, scan_cache_dir, snapshot_download


def contents(directory):
    paths = sorted(p for p in Path(directory).rglob("*") if p.is_file())
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def main(mode, repo, revision):
    out = {"version": huggingface_hub.__version__}
    if mode == "download":
        out["files"] = contents(snapshot_download(repo, revision=revision))
    elif mode == "offline":
        # The whole snapshot, then each file, as transformers requests it.
        directory = snapshot_download(repo, revision=revision, local_files_only=True)
        out["files"] = contents(directory)
        for name in out["files"]:
            assert hf_hub_download(repo, name, revision=revision, local_files_only=True)
    elif mode == "refs":
        refs = HfApi().list_repo_refs(repo)
        out["branches"] = {b.name: b.target_commit for b in refs.branches}
        out["tags"] = {t.name: t.target_commit for t in refs.tags}
    elif mode == "scan":
        info = scan_cache_dir()
        out["warnings"] = [str(w) for w in info.warnings]
        out["size"] = info.size_on_disk
        out["revisions"] = {r.commit_hash: sorted(r.refs) for repo in info.repos for r in repo.revisions}
    print(json.dumps(out))


main(*sys.argv[1:])
