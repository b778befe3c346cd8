//! Parameter counts of the published shapes.

use pricket::loading::estimate;
use pricket::suites::{published_config, published_shapes};
use pricket::weights::Dtype;

/// Total and non-embedding parameters as published (Biderman et al. 2023, table 6; the INCITE model pages).
const PUBLISHED: [(&str, u64, Option<u64>); 27] = [
    ("14m", 14_067_712, Some(1_189_888)),
    ("31m", 30_494_720, Some(4_739_072)),
    ("70m", 70_426_624, Some(18_915_328)),
    ("160m", 162_322_944, Some(85_056_000)),
    ("410m", 405_334_016, Some(302_311_424)),
    ("1b", 1_011_781_632, Some(805_736_448)),
    ("1.4b", 1_414_647_808, Some(1_208_602_624)),
    ("2.8b", 2_775_208_960, Some(2_517_652_480)),
    ("6.9b", 6_857_302_016, Some(6_444_163_072)),
    ("12b", 11_846_072_320, Some(11_327_027_200)),
    ("neox-20b", 20_554_567_680, Some(19_934_859_264)),
    ("incite-3b", 2_775_864_320, None),
    ("incite-7b", 6_857_302_016, None),
    ("mpt-1b", 1_311_442_944, None),
    ("mpt-7b", 6_649_286_656, None),
    ("mpt-7b-8k", 6_649_286_656, None),
    ("mpt-7b-storywriter", 6_649_286_656, None),
    ("mpt-30b", 29_957_200_896, None),
    ("open-llama-3b", 3_426_473_600, Some(3_221_673_600)),
    ("open-llama-7b", 6_738_415_616, Some(6_476_271_616)),
    ("open-llama-13b", 13_015_864_320, Some(12_688_184_320)),
    ("rwkv4-169m", 169_342_464, Some(92_116_992)),
    ("rwkv4-430m", 430_397_440, Some(327_430_144)),
    ("rwkv4-1b5", 1_515_106_304, Some(1_309_171_712)),
    ("rwkv4-3b", 2_984_627_200, Some(2_727_208_960)),
    ("rwkv4-7b", 7_392_649_216, Some(6_980_780_032)),
    ("rwkv4-14b", 14_148_597_760, Some(13_633_761_280)),
];

/// The sum over the tensors that the loading code requests from a store without bytes.
#[test]
fn parameters_of_the_published_shapes_are_as_published() {
    assert_eq!(published_shapes().count(), PUBLISHED.len());
    for (name, total, non_embedding) in PUBLISHED {
        let found = estimate(&published_config(name).unwrap(), Dtype::F16, 2048).unwrap();
        assert_eq!(found.info.parameters, total, "{name}");
        if let Some(non_embedding) = non_embedding {
            let embeddings = 2 * (found.info.vocab * found.info.d_model) as u64;
            assert_eq!(total - embeddings, non_embedding, "{name}");
        }
    }
}

#[test]
fn an_estimate_is_the_file_and_the_cache() {
    let found = estimate(&published_config("1.4b").unwrap(), Dtype::F16, 2048).unwrap();
    // Matrices as stored. Vectors, a thousandth of the whole, in f32.
    let file = 2_829_295_616u64;
    assert!(found.weights >= file && found.weights < file + file / 500, "{}", found.weights);
    assert_eq!(found.cache, 2 * 24 * 2048 * 4 * 2048);
    assert!(found.total() < file + found.cache + (200 << 20));
}

#[test]
fn unknown_shapes_are_none() {
    assert!(published_config("3b").is_none());
}
