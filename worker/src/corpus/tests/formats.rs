//! Corpus formats: the same documents in each, and errors for other files.

use std::io::Write;

use ::parquet::basic::BrotliLevel;
use ::parquet::file::metadata::{ColumnChunkMetaData, ParquetMetaDataReader, ParquetMetaDataWriter, RowGroupMetaData};

use outliers_protocol::CorpusCompression;

use super::*;
use crate::corpus::compressed::Decompressed;
use crate::corpus::file::line_at;
use crate::noise::mix;

/// Documents that test escaping in all formats.
fn awkward() -> Vec<String> {
    (0..30).map(|i| format!("w{i} \"w{},\nw{}\"\tw{}\r\n\n é, ", i + 1, i + 2, i + 3)).collect()
}

fn gzip(bytes: impl AsRef<[u8]>) -> Vec<u8> {
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    packed.write_all(bytes.as_ref()).unwrap();
    packed.finish().unwrap()
}

fn zstd(bytes: impl AsRef<[u8]>) -> Vec<u8> {
    ::zstd::encode_all(bytes.as_ref(), 3).unwrap()
}

fn with_bom(text: &str) -> String {
    format!("\u{feff}{text}")
}

/// Documents among rows without text.
fn json_lines(documents: &[String]) -> String {
    let rows = documents.iter().map(|text| json!({"id": 1, "text": text}));
    let others = [json!({"text": null}), json!({"id": 2})];
    others.into_iter().chain(rows).map(|row| row.to_string() + "\n").collect()
}

fn json_array(documents: &[String]) -> String {
    let rows = documents.iter().map(|text| json!({"text": text, "more": {"a": [1]}}));
    let rows: Vec<Value> = rows.chain([json!({"text": null}), json!({})]).collect();
    serde_json::to_string_pretty(&rows).unwrap()
}

fn table(documents: &[String], separator: &str) -> String {
    let quoted = |text: &String| format!("7{separator}\"{}\"\r\n", text.replace('"', "\"\""));
    format!("id{separator}text\r\n{}", documents.iter().map(quoted).collect::<String>())
}

/// The same documents in all supported formats.
fn everywhere(model: &Model, documents: &[String]) -> Vec<String> {
    let (lines, array) = (json_lines(documents), json_array(documents));
    let (csv, tsv) = (table(documents, ","), table(documents, "\t"));
    let strings = json!(documents).to_string();
    let mut files: Vec<String> = [
        ("a.jsonl", &lines),
        ("b.ndjson", &lines),
        ("C.JSONL", &lines),
        ("d.json", &lines),
        ("e.json", &array),
        ("f.Json", &strings),
        ("g.csv", &csv),
        ("h.tsv", &tsv),
        ("i.CSV", &csv.replace("\"\r\n", "\"\n")),
        ("j.jsonl", &with_bom(&lines)),
        ("k.json", &with_bom(&array)),
        ("l.json", &with_bom(&lines)),
        ("m.csv", &with_bom(&csv)),
        ("n.tsv", &with_bom(&tsv)),
    ]
    .map(|(name, text)| model.write(name, text))
    .into();
    files.extend([
        model.write("o.jsonl.gz", gzip(&lines)),
        model.write("p.jsonl.zst", zstd(&lines)),
        model.write("q.json.GZ", gzip(with_bom(&array))),
        model.write("r.csv.zst", zstd(&csv)),
        // With several gzip members, as written by parallel programs.
        model.write("s.jsonl.gz", [gzip(&lines[..99]), gzip(&lines[99..])].concat()),
        model.write("t.jsonl.zst", [zstd(&lines[..99]), zstd(&lines[99..])].concat()),
    ]);
    let mut with_nulls = documents.to_vec();
    with_nulls.insert(7, String::new());
    let codecs = [
        Compression::UNCOMPRESSED,
        Compression::SNAPPY,
        Compression::GZIP(GzipLevel::default()),
        Compression::BROTLI(BrotliLevel::default()),
        Compression::LZ4,
        Compression::LZ4_RAW,
        Compression::ZSTD(ZstdLevel::default()),
    ];
    for (i, codec) in codecs.into_iter().enumerate() {
        files.push(model.parquet(&format!("{i}.PARQUET"), &with_nulls, 4, codec));
    }
    files.push(model.write("u.parquet.gz", gzip(fs::read(files.last().unwrap()).unwrap())));
    files
}

#[test]
fn every_format_gives_the_ids_and_hash_of_plain_text() {
    let model = Model::plain();
    let documents = awkward();
    let plain = |(i, text): (usize, &String)| match i % 4 {
        0 => model.write(&format!("{i}.txt"), text),
        1 => model.write(&format!("{i}"), with_bom(text)),
        2 => model.write(&format!("{i}.txt.gz"), gzip(with_bom(text))),
        _ => model.write(&format!("{i}.zst"), zstd(text)),
    };
    let plain: Vec<String> = documents.iter().enumerate().map(plain).collect();
    let plain: Vec<&str> = plain.iter().map(String::as_str).collect();
    // All documents: 30 documents of 5 ids.
    let expected = model.load(&files(&plain, Some(15), Some(10))).unwrap();
    assert_eq!(expected.provenance.sha256, format!("{:x}", Sha256::digest(documents.concat())));
    assert_eq!(expected.provenance.tokens_available, 150);
    for file in everywhere(&model, &documents) {
        let tokens = model.load(&files(&[&file], Some(15), Some(10))).unwrap_or_else(|error| panic!("{file}: {error}"));
        assert_eq!(tokens.ids, expected.ids, "{file}");
        assert_eq!(tokens.provenance.sha256, expected.provenance.sha256, "{file}");
        let source = &tokens.provenance.source;
        assert!(source.contains("(field \"text\", 30 documents after 0, as stored)"), "{source}");
    }
}

#[test]
fn every_format_supports_skip_shuffle_and_field() {
    let model = Model::plain();
    let documents = documents(0, 24);
    for file in everywhere(&model, &documents) {
        let spec = CorpusSpec { packing: Packing::Separate, ..files(&[&file], Some(16), Some(4)) };
        let firsts = |spec: CorpusSpec| -> Vec<i64> {
            model.load(&spec).unwrap().ids.chunks(4).map(|window| (window[0] - 3) / 4).collect()
        };
        assert_eq!(firsts(CorpusSpec { skip_documents: 8, ..spec.clone() }), (8..24).collect::<Vec<i64>>(), "{file}");
        let mut shuffled = firsts(CorpusSpec { shuffle_seed: Some(7), ..spec });
        assert!(!shuffled.is_sorted(), "{file}");
        shuffled.sort_unstable();
        shuffled.dedup();
        assert_eq!(shuffled.len(), 16, "{file}: each once");
    }
    let named = CorpusSpec { text_field: "body".into(), ..CorpusSpec::default() };
    for (name, text) in [
        ("a.ndjson", "{\"text\": \"w9\", \"body\": \"w1 w2\"}"),
        ("b.json", "[{\"text\": \"w9\", \"body\": \"w1 w2\"}]"),
        ("c.csv", "text,body\nw9,w1 w2\n"),
        ("d.tsv", "text\tbody\nw9\tw1 w2"),
    ] {
        let spec = CorpusSpec { source: files(&[&model.write(name, text)], None, None).source, ..named.clone() };
        assert_eq!(model.load(&CorpusSpec { sequence_length: Some(2), ..spec }).unwrap().ids, [4, 5], "{name}");
    }
}

#[test]
fn empty_text_is_a_document_and_missing_text_is_not() {
    let model = Model::plain();
    for (name, text) in [
        ("a.jsonl", "{\"text\": \"\"}\n{\"text\": null}\n{}\n{\"text\": \"w1 w2\"}\n"),
        ("b.json", "[{\"text\": \"\"}, {\"text\": null}, {}, {\"text\": \"w1 w2\"}]"),
        ("c.csv", "id,text\n1,\n\n2,w1 w2\n"),
        ("d.tsv", "id\ttext\n1\t\"\"\n\n2\tw1 w2\n"),
    ] {
        let file = model.write(name, text);
        let tokens = model.load(&files(&[&file], Some(1), Some(2))).unwrap();
        assert_eq!(tokens.ids, [4, 5], "{name}");
        let source = &tokens.provenance.source;
        assert!(source.contains(" 2 documents after 0"), "{source}");
    }
    for (name, text) in [("a.jsonl", "{\"text\": null}\n"), ("b.json", "[{\"text\": null}]"), ("c.csv", "text\n")] {
        assert!(model.refused(&files(&[&model.write(name, text)], None, Some(2))).1.contains("is empty"), "{name}");
    }
}

/// Message and hint, separated by a bar.
fn said(model: &Model, file: &str) -> String {
    let error = model.load(&files(&[file], Some(1), Some(2))).unwrap_err();
    assert_eq!(error.kind(), FailureKind::Corpus, "{error}");
    format!("{} | {}", error.message(), error.hint_text().unwrap())
}

#[test]
fn missing_field_error_lists_the_present_fields() {
    let model = Model::plain();
    for (name, text, says) in [
        (
            "a.jsonl",
            "{\"id\": 1}\n{\"id\": 2, \"body\": \"w1\"}\n",
            "a.jsonl has no field \"text\" in any of 2 rows: they have \"id\", \"body\" |",
        ),
        (
            "b.json",
            "[{\"id\": 1}, {\"body\": \"w1\"}]",
            "b.json has no field \"text\" in any of 2 rows: they have \"id\", \"body\" |",
        ),
        ("c.jsonl", "{}\n", "in any of 1 rows: they have no field |"),
        ("d.csv", "id,body\n1,w1\n", "d.csv has no column \"text\": its first line names \"id\", \"body\" |"),
        ("e.csv", "id;text\n1;w1\n", "its first line names \"id;text\" | name the column"),
        ("f.jsonl", "{\"text\": \"w1 w2\"}\n\n{\"text\": [1], \"n\": 1, \"body\": \"w1\"}\n", "line 3 of"),
        (
            "f.jsonl",
            "{\"text\": [1], \"n\": 1, \"body\": \"w1\"}\n",
            "has no text in its field \"text\": it is an array | --text-field names the field that holds the text; it has text in \"body\"",
        ),
        ("g.json", "[\"w1\",\n {\"text\": 7}]", "element 2 (line 2) of"),
        (
            "g.json",
            "[{\"text\": 7}]",
            "it is a number | --text-field names the field that holds the text; it has text in no field",
        ),
    ] {
        let said = said(&model, &model.write(name, text));
        assert!(said.contains(says), "{said}");
    }
    // The field is absent: the file is refused before all of it is read.
    let row = json!({"id": "x".repeat(1 << 20)}).to_string() + "\n";
    let long = model.write("long.jsonl", row.repeat(80) + "{\"text\": \"w1 w2\"}\n");
    assert!(said(&model, &long).contains("in any of 6"), "{}", said(&model, &long));
}

#[test]
fn line_errors_state_the_line_number() {
    let model = Model::plain();
    for (name, text, says) in [
        ("a.jsonl", "\n{\"text\": \"w1\"}\n{\"text\": \"w2\n", "line 3 of"),
        ("b.jsonl", "{\"text\": \"w1\"}\n{text: 1}\n", "is not JSON: \"key must be a string\", at column 2"),
        ("c.jsonl", "[{\"text\": \"w1\"}]\n", "line 1 of"),
        ("c.jsonl", "[1, 2]\n", "is an array, not an object | token ids go to --token-ids"),
        (
            "d.json",
            "{\n \"data\": []\n}\n",
            "ends inside a JSON value | a .jsonl or .ndjson file has one JSON object per line; a .json file",
        ),
        ("e.json", "Once upon a time", "e.json is neither a JSON array nor JSON Lines | "),
        ("f.json", "[{\"text\": \"w1\"},\n\n{\"text\" 1}]", "element 2 (line 3) of"),
        ("g.json", "[{\"text\": \"w1\"}\n", "element 2 (line 2) of"),
        ("h.json", "[{\"text\": \"w1\"}] w2", "is the last of an array, but more follows"),
        ("i.json", "[{\"text\": \"w1\"} {\"text\": \"w1\"}]", "is not followed by a comma"),
        ("j.csv", "id,text\n1,\"a\nb\"\n2,b,c\n", "line 4 of"),
        ("j.csv", "id,text\r\n1,a\r\n\r\n2,b,c\r\n", "line 4 of"),
        ("j.csv", "id,text\n1,b,c\n", "has 3 cells, the header has 2"),
        ("k.csv", "id,text\n1,a\n2,\"b\n3,c\n4,d\n", "line 3 of"),
        ("l.tsv", "id\ttext\n1\t\"so\" she said\n2\tw2\n", "has a cell whose quotes do not end with it"),
    ] {
        let said = said(&model, &model.write(name, text));
        assert!(said.contains(says), "{said}");
    }
    let latin1 = model.write("m.jsonl", b"{\"text\": \"w1\"}\n{\"text\": \"caf\xe9\"}\n");
    assert!(said(&model, &latin1).contains("line 2 of"), "{}", said(&model, &latin1));
    assert!(said(&model, &latin1).contains("is not UTF-8 from its byte 14 on | convert"), "{}", said(&model, &latin1));
    for name in ["n.txt", "n.csv", "n.json"] {
        let latin1 = model.write(name, b"[\n\"caf\xe9\"]");
        assert!(
            said(&model, &latin1).contains("is not UTF-8: the bytes from 6 on (line 2)"),
            "{}",
            said(&model, &latin1)
        );
    }
}

#[test]
fn late_line_errors_state_the_line_number() {
    let model = Model::plain();
    let line = json!({"text": format!("w1{}", " ".repeat(300))}).to_string() + "\n";
    // About 12 MB; the last line is in the third block.
    let file = model.write("a.jsonl", line.repeat(40_000) + "nonsense\n");
    let spec = files(&[&file], Some(200_000), Some(64));
    assert!(model.refused(&spec).1.starts_with("line 40001 of"), "{:?}", model.refused(&spec));
    let file = LocalFile::open(&file).unwrap();
    assert!(line_at(&file, line.len() as u64).starts_with("line 2 of"));
    assert!(line_at(&file, 0).starts_with("line 1 of"));
}

#[test]
fn binary_files_are_refused_by_name() {
    let model = Model::plain();
    let mut tar = vec![0; 1024];
    tar[..5].copy_from_slice(b"a.txt");
    tar[257..262].copy_from_slice(b"ustar");
    let utf16 = |text: &str| -> Vec<u8> { with_bom(text).encode_utf16().flat_map(u16::to_le_bytes).collect() };
    let parquet = fs::read(model.parquet("a.parquet", &documents(0, 4), 4, Compression::SNAPPY)).unwrap();
    let safetensors = fs::read(tensor_file(model.0.path(), "input_ids", StoredDtype::I64, &[1, 2], &[1, 2])).unwrap();
    let files: [(&[u8], &str); 15] = [
        (&gzip("w1 w2"), "is a gzip file | let its name end in .gz"),
        (&zstd("w1 w2"), "is a zstd file | let its name end in .zst"),
        (b"BZh91AY&SY\x01\x02", "is a bzip2 file | unpack it"),
        (b"\xfd7zXZ\0\0\x04", "is an xz file | unpack it"),
        (b"7z\xbc\xaf\x27\x1c\0\x04", "is a 7z archive | unpack it"),
        (b"PK\x03\x04\x14\0", "is a zip archive, or a document or checkpoint in one | unpack it"),
        (&tar, "is a tar archive | unpack it"),
        (b"%PDF-1.7\n1 0 obj w1 w2\n", "is a PDF document | save its text"),
        (b"{\\rtf1 w1 w2}", "is an RTF document | save its text"),
        (&parquet, "is a Parquet file | let its name end in .parquet"),
        (&safetensors, "is a safetensors file | ready token ids go to --token-ids"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 12\n", "is a Git LFS pointer"),
        (&utf16("w1 w2"), "is text in UTF-16 | convert it to UTF-8, for example with `iconv -f utf-16 -t utf-8`"),
        (b"\xfe\xff\x00w\x00\x30\x31", "is text in UTF-16 | convert"),
        (b"\xff\xfe\0\0w\0\0\0", "is text in UTF-32 | convert"),
    ];
    for (bytes, says) in files {
        for name in ["a.txt", "noending", "a.jsonl", "a.json", "a.csv", "a.parquet"] {
            if name == "a.parquet" && bytes.starts_with(b"PAR1") {
                continue;
            }
            let said = said(&model, &model.write(name, bytes));
            assert!(said.contains(&format!("{name} {says}")), "{said}");
            // The same inside a compressed file.
            let said = self::said(&model, &model.write(&format!("{name}.gz"), gzip(bytes)));
            assert!(said.contains(says), "{said}");
        }
    }
    let unmarked: Vec<u8> = "w1 w2".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let said = said(&model, &model.write("a.txt", unmarked));
    assert!(said.contains("byte 1 (line 1) is zero | if it is text in UTF-16"), "{said}");
}

#[test]
fn json_named_txt_is_refused() {
    let model = Model::plain();
    let lines = json_lines(&documents(0, 4));
    let array = json_array(&documents(0, 4));
    for text in [&lines, &array, &with_bom(&lines), &format!("\n {array}\n"), &json!({"data": ["w1 w2"]}).to_string()] {
        for name in ["a.txt", "noending", "a.text.gz"] {
            let bytes = if name.ends_with("gz") { gzip(text) } else { text.clone().into_bytes() };
            let said = said(&model, &model.write(name, bytes));
            assert!(said.contains("holds JSON, but its name is that of a text | let its name end in .jsonl"), "{said}");
            assert!(said.contains("jq -Rs '[.]'"), "{said}");
        }
    }
    // As the hint says: the JSON text as one document.
    let file = model.write("a.json", json!([lines]).to_string());
    let tokens = model.load(&files(&[&file], Some(1), Some(3))).unwrap();
    assert_eq!(tokens.provenance.sha256, format!("{:x}", Sha256::digest(&lines)));
    for prose in ["[1] w1 w2 w3\n{w1} w2", "{w1} w2 w3", "w1\n{\"text\": \"w2\"}\n", "\"w1 w2\""] {
        assert!(model.load(&files(&[&model.write("a.txt", prose)], Some(1), Some(2))).is_ok(), "{prose}");
    }
}

#[test]
fn compressed_files_are_bounded_and_complete() {
    let model = Model::plain();
    let text = "w1 w2 ".repeat(100_000);
    for (name, packed, compression) in
        [("a.txt.gz", gzip(&text), CorpusCompression::Gzip), ("a.txt.zst", zstd(&text), CorpusCompression::Zstd)]
    {
        let path = model.write(name, &packed);
        let file = LocalFile::open(&path).unwrap();
        let all = text.len() as u64;
        assert_eq!(Decompressed::of(&file, compression, all).unwrap().read(0..all).unwrap(), text.as_bytes());
        let error = Decompressed::of(&file, compression, all - 1).err().unwrap();
        assert!(error.message().contains(&format!("over the limit of {}", all - 1)), "{error}");
        assert!(error.hint_text().is_some());
        let said = said(&model, &model.write(name, &packed[..packed.len() / 2]));
        assert!(said.contains("cannot be unpacked with") && said.contains("not all there"), "{said}");
        let said = self::said(&model, &model.write(name, "w1 w2"));
        assert!(said.contains("cannot be unpacked with"), "{said}");
        let said = self::said(&model, &model.write(name, b"PK\x03\x04\x14\0"));
        assert!(said.contains("it is a zip archive"), "{said}");
    }
}

#[test]
fn damaged_files_are_read_or_refused_with_a_hint() {
    let model = Model::plain();
    // Parquet is decoded by a library.
    let ours = everywhere(&model, &awkward()).into_iter().filter(|file| !file.to_lowercase().contains("parquet"));
    for (number, file) in ours.enumerate() {
        let whole = fs::read(&file).unwrap();
        for round in 0..20 {
            let noise = mix((number * 1000 + round) as u64);
            let mut bytes = whole.clone();
            let at = (noise >> 8) as usize % bytes.len();
            match noise % 3 {
                0 => bytes.truncate(at),
                1 => bytes[at] ^= 1 << ((noise >> 4) % 8),
                _ => bytes[at] = b"\"\n,[]{}\0"[(noise >> 4) as usize % 8],
            }
            fs::write(&file, bytes).unwrap();
            if let Err(error) = model.load(&files(&[&file], Some(2), Some(3))) {
                assert_eq!(error.kind(), FailureKind::Corpus, "{file} {round}: {error}");
                assert!(error.hint_text().is_some(), "{file} {round}: {error}");
            }
        }
    }
}

#[test]
fn unsupported_parquet_codec_is_named() {
    let model = Model::plain();
    let file = model.parquet("a.parquet", &documents(0, 4), 4, Compression::UNCOMPRESSED);
    let mut bytes = fs::read(&file).unwrap();
    let metadata = ParquetMetaDataReader::new().parse_and_finish(&bytes::Bytes::from(bytes.clone())).unwrap();
    let lzo =
        |chunk: &ColumnChunkMetaData| chunk.clone().into_builder().set_compression(Compression::LZO).build().unwrap();
    let group = |group: &RowGroupMetaData| {
        let columns = group.columns().iter().map(lzo).collect();
        group.clone().into_builder().set_column_metadata(columns).build().unwrap()
    };
    let groups = metadata.row_groups().iter().map(group).collect();
    let metadata = metadata.into_builder().set_row_groups(groups).build();
    ParquetMetaDataWriter::new(&mut bytes, &metadata).finish().unwrap();
    let said = said(&model, &model.write("a.parquet", bytes));
    assert!(said.contains("is packed with LZO | write it again with another codec"), "{said}");
}

#[test]
fn token_ids_may_have_a_byte_order_mark() {
    let model = Model::plain();
    let ids = model.write("ids.json", with_bom("[[1,2],[3,4]]"));
    assert_eq!(model.load(&token_ids(&ids)).unwrap().ids, [1, 2, 3, 4]);
    let (_, message) = model.refused(&token_ids(&model.write("ids.json.gz", gzip("[[1,2]]"))));
    assert!(message.contains("ids.json.gz: it is a gzip file"), "{message}");
}

/// Descriptions and tables beside documents are not read.
#[test]
fn only_document_files_of_a_dataset_are_read() {
    let chosen = |path: &str, name: &str| {
        let dataset = Dataset { id: "a/b".into(), revision: "main".into(), path: path.into() };
        holds_documents(&dataset, name)
    };
    for name in ["x.parquet", "x.jsonl", "x.ndjson", "d/X.JSONL", "x.json.gz", "x.csv", "x.tsv.zst"] {
        assert!(chosen("", name), "{name}");
    }
    for name in ["README.md", "x.txt", "x.txt.gz", "x.zip", "dataset_infos.json", "d/state.json", ".gitattributes"] {
        assert!(!chosen("", name), "{name}");
    }
    assert!(chosen("d", "d/x.csv") && chosen("d/x.csv", "d/x.csv") && chosen("state.json", "state.json"));
    assert!(!chosen("d", "dd/x.csv") && !chosen("d", "x.csv"));
    assert!(by_ranges("x.ndjson") && by_ranges("X.PARQUET"));
    assert!(!by_ranges("x.json") && !by_ranges("x.jsonl.gz") && !by_ranges("x.csv"));
}
