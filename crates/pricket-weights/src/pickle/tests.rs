//! Tests of the pickle reader, with hostile streams among them.

use super::*;

#[test]
fn a_nested_list_a_million_deep_is_refused_without_overflow() {
    let mut bytes = vec![0x80, 2];
    bytes.extend(std::iter::repeat_n(b']', 2_000_000));
    assert!(matches!(read(&bytes), Err(Fault::Malformed(_))));
    // 100,000 levels fit: each list is appended to the one below it.
    let mut bytes = vec![0x80, 2];
    bytes.extend(std::iter::repeat_n(b']', 100_000));
    bytes.extend(std::iter::repeat_n(b'a', 99_999));
    bytes.push(b'.');
    assert!(read(&bytes).is_ok());
}

#[test]
fn a_short_pickle_cannot_name_one_thing_a_million_times() {
    // A list that names memo slot 0, a string, a million times.
    let mut bytes = b"\x80\x02U\x01xq\x000](".to_vec();
    bytes.extend(b"h\x00".repeat(1_000_000));
    bytes.extend(b"e.");
    assert!(matches!(read(&bytes), Err(Fault::Malformed(_))));
    // One tuple, used repeatedly as the argument of a size.
    let mut bytes = b"\x80\x02ctorch\nSize\nq\x00(K\x01K\x02t\x85q\x01".to_vec();
    bytes.extend(b"h\x00h\x01R0".repeat(300_000));
    bytes.push(b'.');
    assert!(read(&bytes).is_ok(), "nothing is kept");
}

#[test]
fn a_name_of_a_megabyte_is_not_repeated_in_the_message() {
    let bytes = [b"\x80\x02c", "\u{1}".repeat(1 << 20).as_bytes(), b"\nx\n."].concat();
    let Err(Fault::Forbidden(name)) = read(&bytes) else { panic!("accepted") };
    assert!(name.len() < 2000, "{}", name.len());
}

#[test]
fn a_list_that_holds_itself_is_harmless() {
    let pickle = read(b"\x80\x02]q\x00h\x00a.").unwrap();
    assert_eq!(pickle.get(pickle.root), &Value::List(vec![pickle.root]));
}

#[test]
fn globals_outside_the_list_are_named() {
    assert_eq!(read(b"\x80\x02cposix\nsystem\n.").unwrap_err(), Fault::Forbidden("posix system".into()));
    let stack_global = b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.";
    assert_eq!(read(stack_global).unwrap_err(), Fault::Forbidden("builtins eval".into()));
}

#[test]
fn opcodes_that_build_instances_are_refused() {
    for opcode in [b'o', b'i', 0x81, 0x92, b'P', 0x82] {
        assert!(matches!(read(&[0x80, 2, opcode]), Err(Fault::Malformed(_))), "{opcode:#x}");
    }
}

proptest::proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..400)) {
        let _ = read(&bytes);
    }
}
