//! Every way in which tar says a thing.

use std::io::Write;
use std::process::Command;

use crate::support::archive::{Entry, archive, binary, extended, padded, record, tar};
use crate::support::{Content, Listing, build, listing};

fn file<'a>(listing: &'a Listing, path: &str) -> &'a [u8] {
    match &listing[path.as_bytes()].content {
        Content::File(data) => data,
        other => panic!("{path}: {other:?}"),
    }
}

fn link(listing: &Listing, path: &str) -> String {
    match &listing[path.as_bytes()].content {
        Content::Symlink(target) => String::from_utf8(target.clone()).unwrap(),
        other => panic!("{path}: {other:?}"),
    }
}

#[test]
fn long_names_of_every_format() {
    let deep = |n: usize| format!("{}/{}", "d".repeat(n), "f".repeat(n));
    let mut ustar = Entry::file("short", b"ustar");
    ustar.path = b"name".to_vec();
    let mut with_prefix = ustar.header();
    with_prefix.set(345, "p".repeat(155).as_bytes());
    let mut star = ustar.header();
    star.set(345, b"star-prefix\0");
    star.set(476, b"1234567 \x001234567 \x00");
    star.set(508, b"tar\0");
    let image = listing(&[archive(&[
        Entry::file(&deep(120), b"pax").pax(),
        Entry::file(&deep(130), b"gnu").gnu(),
        Entry::symlink(&deep(140), &deep(150)).gnu(),
        [with_prefix.finish().to_vec(), padded(b"ustar")].concat(),
        [star.finish().to_vec(), padded(b"star!")].concat(),
        Entry::file(&"n".repeat(100), b"no NUL at its end").plain(),
    ])]);
    assert_eq!(file(&image, &deep(120)), b"pax");
    assert_eq!(file(&image, &deep(130)), b"gnu");
    assert_eq!(link(&image, &deep(140)), deep(150));
    assert_eq!(file(&image, &format!("{}/name", "p".repeat(155))), b"ustar");
    assert_eq!(file(&image, "star-prefix/name"), b"star!");
    assert_eq!(file(&image, &"n".repeat(100)), b"no NUL at its end");
}

#[test]
fn archives_from_before_posix() {
    let mut directory = Entry::dir("old/").header();
    directory.set(156, b"\0");
    directory.set(257, &[0; 8]);
    let mut plain = Entry::file("old/file", b"v7").header();
    plain.set(156, b"\0");
    plain.set(257, &[0; 8]);
    plain.set(345, b"not a prefix here");
    // Some wrote the checksum over signed bytes.
    let mut signed = Entry::file("old/\u{e9}", b"").header();
    signed.set(148, b"        ");
    let sum: i64 = signed.0.iter().map(|byte| i64::from(byte.cast_signed())).sum();
    signed.set(148, format!("{sum:06o}\0 ").as_bytes());
    let image = listing(&[archive(&[
        directory.finish().to_vec(),
        [plain.finish().to_vec(), padded(b"v7")].concat(),
        signed.0.to_vec(),
    ])]);
    assert_eq!(image[b"old".as_slice()].content, Content::Directory);
    assert_eq!(file(&image, "old/file"), b"v7");
    assert_eq!(file(&image, "old/é"), b"");
}

#[test]
fn numbers_that_octal_cannot_hold() {
    let owner = Entry { uid: 4_000_000_000, gid: 70_000_000, mtime: (-5, 0), ..Entry::file("gnu", b"") };
    let fraction = Entry { mtime: (-5, 250_000_000), ..Entry::file("pax", b"") };
    let fine = Entry { mtime: (1 << 34, 123_456_789), uid: u32::MAX - 1, ..Entry::file("fine", b"") };
    let image = listing(&[archive(&[owner.gnu(), fraction.pax(), fine.pax()])]);
    let gnu = &image[b"gnu".as_slice()];
    assert_eq!((gnu.uid, gnu.gid, gnu.mtime), (4_000_000_000, 70_000_000, (-5, 0)));
    assert_eq!(image[b"pax".as_slice()].mtime, (-5, 250_000_000));
    assert_eq!(
        (image[b"fine".as_slice()].uid, image[b"fine".as_slice()].mtime),
        (u32::MAX - 1, (1 << 34, 123_456_789))
    );
}

#[test]
fn the_size_of_content_is_the_one_of_the_extended_header() {
    // A header that says 0 before content of 1536 bytes which looks like an entry of its own.
    let smuggled = Entry::file("smuggled", b"x").pax();
    let mut header = Entry::file("outer", b"").header();
    header.octal(124, 12, 0);
    let size = smuggled.len() + 512;
    let payload = extended(b'x', &record(b"size", size.to_string().as_bytes()));
    let content = [smuggled.as_slice(), &[7; 512]].concat();
    let parts = [payload, header.finish().to_vec(), content.clone(), Entry::file("after", b"").pax()];
    let image = listing(&[archive(&parts)]);
    assert_eq!(image.len(), 3);
    assert_eq!(file(&image, "outer"), content);
    // And the other way round: the header says more than the extended header.
    let mut header = Entry::file("outer", &[0; 1024]).header();
    header.octal(124, 12, 1024);
    let payload = extended(b'x', &record(b"size", b"0"));
    let image = listing(&[archive(&[payload, header.finish().to_vec(), Entry::file("seen", b"").pax()])]);
    assert_eq!(file(&image, "outer"), b"");
    assert_eq!(file(&image, "seen"), b"");
    // The size of an extended header that lies between is its own.
    let payload = extended(b'x', &record(b"size", b"3"));
    let long = extended(b'L', b"a-long-name\0");
    let image = listing(&[archive(&[payload, long, Entry::file("x", b"abc").plain()])]);
    assert_eq!(file(&image, "a-long-name"), b"abc");
}

#[test]
fn links_and_directories_have_no_content_whatever_they_say() {
    let mut parts = Vec::new();
    for kind in [b'1', b'2', b'5', b'6'] {
        let mut header =
            Entry { link: b"target".to_vec(), ..Entry::new(kind, &format!("kind{kind}")) }.header();
        header.octal(124, 12, 512);
        parts.push(header.finish().to_vec());
    }
    let target = Entry::file("target", b"t").pax();
    let image = listing(&[archive(&[target, parts.concat()])]);
    assert_eq!(image.len(), 6);
    assert_eq!(file(&image, "kind49"), b"t");
}

#[test]
fn global_headers_give_times_and_owners_but_no_names() {
    let global =
        extended(b'g', &[record(b"uid", b"77"), record(b"path", b"evil"), record(b"comment", b"x")].concat());
    let own = extended(b'x', &record(b"uid", b"78"));
    let image =
        listing(&[archive(&[global, Entry::file("one", b"").plain(), own, Entry::file("two", b"").plain()])]);
    assert_eq!((image[b"one".as_slice()].uid, image[b"two".as_slice()].uid), (77, 78));
}

#[test]
fn ends_of_archives_that_are_tolerated() {
    let entry = Entry::file("f", b"content").pax();
    let whole = [entry.clone(), vec![0; 1024]].concat();
    let without_end = entry.clone();
    let without_padding = entry[..512 + 7].to_vec();
    let one_block = [entry.clone(), vec![0; 512]].concat();
    let trailing = [whole.clone(), Entry::file("ignored", b"").pax(), vec![9; 5000]].concat();
    for tar in [whole, without_end, without_padding, one_block, trailing] {
        let image = listing(&[tar]);
        assert_eq!((image.len(), file(&image, "f")), (2, b"content".as_slice()));
    }
    assert_eq!(listing(&[Vec::new()]).len(), 1);
    assert_eq!(listing(&[]).len(), 1);
}

/// A sparse file of 300 KiB and a bit: data at 0, at 100 KiB + 3, and its last 10 bytes.
fn sparse_file() -> (Vec<u8>, Vec<(usize, usize)>) {
    let map = vec![(0, 5000), (100 * 1024 + 3, 1000), (300 * 1024, 10)];
    let mut data = vec![0; 300 * 1024 + 10];
    for (offset, len) in &map {
        data[*offset..offset + len].fill(0xd5);
    }
    (data, map)
}

fn stored(data: &[u8], map: &[(usize, usize)]) -> Vec<u8> {
    map.iter().flat_map(|(offset, len)| &data[*offset..offset + len]).copied().collect()
}

#[test]
fn sparse_files_of_the_old_format() {
    let (data, mut map) = sparse_file();
    // More segments than the header and one block hold.
    map.extend((0..40).map(|_| (data.len(), 0)));
    let stored = stored(&data, &map);
    let entry = Entry { kind: b'S', ..Entry::file("sparse", &stored) };
    let mut header = entry.header();
    header.set(257, b"ustar  \0");
    header.set(345, &[0; 41]);
    let segment = |(offset, len): &(usize, usize)| {
        [binary(*offset as u64, 12), format!("{len:011o}\0").into()].concat()
    };
    let segments: Vec<_> = map.iter().flat_map(segment).collect();
    header.set(386, &segments[..96]);
    header.set(482, &[1]);
    header.octal(483, 12, data.len() as u64);
    let mut blocks = Vec::new();
    let rest: Vec<_> = segments[96..].chunks(21 * 24).collect();
    for (index, chunk) in rest.iter().enumerate() {
        let mut block = chunk.to_vec();
        block.resize(512, 0);
        block[504] = u8::from(index + 1 < rest.len());
        blocks.extend(block);
    }
    let image =
        listing(&[archive(&[header.finish().to_vec(), blocks, padded(&stored), Entry::dir("next").pax()])]);
    assert!(file(&image, "sparse") == data);
    assert!(image.contains_key(b"next".as_slice()));
}

#[test]
fn sparse_files_of_the_pax_formats() {
    let (data, map) = sparse_file();
    let content = stored(&data, &map);
    let size = data.len().to_string();
    let numbers: Vec<_> =
        map.iter().flat_map(|(offset, len)| [offset.to_string(), len.to_string()]).collect();
    let mut pairs = record(b"GNU.sparse.numblocks", b"3");
    for pair in numbers.chunks(2) {
        pairs.extend(record(b"GNU.sparse.offset", pair[0].as_bytes()));
        pairs.extend(record(b"GNU.sparse.numbytes", pair[1].as_bytes()));
    }
    let v00 = [record(b"GNU.sparse.size", size.as_bytes()), pairs].concat();
    let v01 = [
        record(b"GNU.sparse.size", size.as_bytes()),
        record(b"GNU.sparse.map", numbers.join(",").as_bytes()),
        record(b"GNU.sparse.name", b"v01"),
    ];
    let v10 = [
        record(b"GNU.sparse.major", b"1"),
        record(b"GNU.sparse.minor", b"0"),
        record(b"GNU.sparse.name", b"v10"),
        record(b"GNU.sparse.realsize", size.as_bytes()),
    ];
    let map_text = format!("3\n{}\n", numbers.join("\n"));
    let leading = [padded(map_text.as_bytes()), content.clone()].concat();
    let image = listing(&[archive(&[
        extended(b'x', &v00),
        Entry::file("v00", &content).plain(),
        extended(b'x', &v01.concat()),
        Entry::file("GNUSparseFile.0/v01", &content).plain(),
        extended(b'x', &v10.concat()),
        Entry::file("GNUSparseFile.0/v10", &leading).plain(),
        Entry::dir("next").pax(),
    ])]);
    assert_eq!(image.len(), 5);
    for name in ["v00", "v01", "v10"] {
        assert!(file(&image, name) == data, "{name}");
    }
}

#[test]
fn holes_take_no_room() {
    let name = record(b"GNU.sparse.map", b"0,1,1099511627775,1");
    let size = record(b"GNU.sparse.size", b"1099511627776");
    let header = extended(b'x', &[name, size].concat());
    let (image, _) = build(&[archive(&[header, Entry::file("1TiB", b"ab").plain()])]).unwrap();
    // Two chunks of 4 MiB with content, and the map.
    assert!(image.len() < 10 << 20, "{} bytes", image.len());
    let zeros = vec![0; 1 << 20];
    let (image, _) = build(&[tar(&[Entry::file("zeros", &zeros)])]).unwrap();
    assert!(image.len() <= 3 * 4096, "{} bytes", image.len());
}

#[test]
fn attributes_arrive_as_they_are() {
    let capability = vec![1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let acl = vec![2, 0, 0, 0, 1, 0, 6, 0, 0xff, 0xff, 0xff, 0xff];
    let all = [
        ("security.capability", capability),
        ("system.posix_acl_access", acl.clone()),
        ("system.posix_acl_default", acl),
        ("user.big", vec![b'\n'; 20_000]),
        ("user.empty", Vec::new()),
        ("trusted.t", vec![0]),
    ];
    let xattrs: Vec<_> = all.iter().map(|(name, value)| (name.as_bytes().to_vec(), value.clone())).collect();
    let dropped = (b"trusted.overlay.redirect".to_vec(), b"/".to_vec());
    let of_file = xattrs.iter().cloned().chain([dropped]).collect();
    let small = xattrs[..2].to_vec();
    let layers = [tar(&[
        Entry { xattrs: small.clone(), ..Entry::dir("./") },
        Entry { xattrs: of_file, mode: 0o6755, ..Entry::file("file", &[1; 5000]) },
        Entry { xattrs: small.clone(), ..Entry::file("small", b"inline") },
        Entry { xattrs: xattrs[3..4].to_vec(), ..Entry::symlink("link", &"t".repeat(4000)) },
        Entry { xattrs: small.clone(), ..Entry::symlink("long", &"t".repeat(4095)) },
        Entry { xattrs: small, ..Entry::dir("dir") },
    ])];
    let image = listing(&layers);
    let count = |path: &str| image[path.as_bytes()].xattrs.len();
    assert_eq!(
        [count(""), count("file"), count("small"), count("link"), count("long"), count("dir")],
        [2, 6, 2, 1, 2, 2]
    );
    for (name, value) in xattrs {
        assert_eq!(image[b"file".as_slice()].xattrs[&name], value);
    }
    assert_eq!((image[b"file".as_slice()].mode, link(&image, "long").len()), (0o6755, 4095));
    let (bytes, summary) = build(&layers).unwrap();
    assert_eq!(summary.dropped_xattrs, 1);
    crate::support::fsck(&bytes);
}

/// Archives that GNU tar itself makes, in its three formats and with sparse files, where it is installed.
#[test]
fn archives_of_gnu_tar() {
    let dir = tempfile::tempdir().unwrap();
    let (data, _) = sparse_file();
    let long = "x".repeat(200);
    std::fs::create_dir(dir.path().join(&long)).unwrap();
    std::fs::write(dir.path().join(&long).join("plain"), b"plain").unwrap();
    std::os::unix::fs::symlink(&long, dir.path().join("link")).unwrap();
    std::fs::hard_link(dir.path().join(&long).join("plain"), dir.path().join("second")).unwrap();
    let mut sparse = std::fs::File::create(dir.path().join("sparse")).unwrap();
    sparse.set_len(data.len() as u64).unwrap();
    for (offset, len) in sparse_file().1 {
        std::io::Seek::seek(&mut sparse, std::io::SeekFrom::Start(offset as u64)).unwrap();
        sparse.write_all(&data[offset..offset + len]).unwrap();
    }
    for options in [
        ["--format=gnu", "--sparse"],
        ["--format=posix", "--sparse"],
        ["--format=posix", "--sparse-version=0.0"],
        ["--format=posix", "--sparse-version=0.1"],
    ] {
        let tar = Command::new("tar")
            .args(options)
            .args(["--sparse", "-C"])
            .arg(dir.path())
            .args(["-c", "."])
            .output();
        let Ok(tar) = tar else { return };
        let image = listing(&[tar.stdout]);
        assert!(file(&image, "sparse") == data, "{options:?}");
        assert_eq!(file(&image, &format!("{long}/plain")), b"plain");
        assert_eq!(link(&image, "link"), long);
        assert_eq!((file(&image, "second"), image[b"second".as_slice()].nlink), (b"plain".as_slice(), 2));
    }
}
