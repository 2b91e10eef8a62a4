use super::*;

#[test]
fn lfs_pointers_web_pages_and_empty_files_are_distinguished() {
    for (start, says, hint) in [
        (&b""[..], "empty (0 bytes)", "fetch the file again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n", "Git LFS pointer", "git lfs pull"),
        (b"<!DOCTYPE html><html lang=en>", "HTML page", "login or error page"),
        (b"\xef\xbb\xbf\r\n  <HTML>", "HTML page", "login or error page"),
    ] {
        let error = refuse(start).unwrap_err();
        assert!(error.message().contains(says) && error.hint_text().unwrap().contains(hint), "{error}");
    }
}

#[test]
fn checkpoint_files_are_not_flagged() {
    let files =
        [&b"{\"vocab_size\": 1}"[..], b"#version: 0.2\n", b"PK\x03\x04", b"version 2\n", b"<htm", b"\0", b"IQ== 0\n"];
    for start in files {
        refuse(start).unwrap();
    }
}
