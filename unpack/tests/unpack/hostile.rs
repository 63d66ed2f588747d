//! Layers made to break things. Each must end in the right error, or in an image that a checker accepts.

use std::convert::Infallible;
use std::io::{self, Read};

use hyper_unpack::{
    ArchiveError, BlockSink, Compression, EntryError, LayerInput, Limits, UnpackError, unpack,
};

use crate::support::archive::{Entry, Header, archive, binary, extended, padded, record, tar};
use crate::support::random::Random;
use crate::support::{build, build_with, erofs, listing};

fn error(parts: &[Vec<u8>]) -> UnpackError {
    build(&[archive(parts)]).unwrap_err()
}

fn entry_error(entries: &[Entry]) -> EntryError {
    match build(&[tar(entries)]).unwrap_err() {
        UnpackError::Entry { source, .. } => source,
        other => panic!("{other:?}"),
    }
}

fn archive_error(parts: &[Vec<u8>]) -> ArchiveError {
    match error(parts) {
        UnpackError::Archive { source, .. } => source,
        other => panic!("{other:?}"),
    }
}

fn limit(layers: &[Vec<u8>], limits: &Limits) -> &'static str {
    match build_with(layers, limits).unwrap_err() {
        UnpackError::Limit { source, .. } => source.what,
        other => panic!("{other:?}"),
    }
}

#[test]
fn names_cannot_leave_the_root() {
    for name in ["../etc/passwd", "a/../../b", "/../x", "..", "./.."] {
        assert!(matches!(entry_error(&[Entry::file(name, b"")]), EntryError::Escapes), "{name}");
    }
    let target = Entry::file("f", b"");
    let link = Entry::hard_link("l", "../../etc/shadow");
    assert!(matches!(entry_error(&[target, link]), EntryError::Escapes));
}

#[test]
fn links_on_the_way_stay_inside_and_end() {
    let image = listing(&[tar(&[
        Entry::symlink("out", "/../../../../.."),
        Entry::symlink("again", "out/../.."),
        Entry::file("again/x", b"inside"),
    ])]);
    assert!(image.contains_key(b"x".as_slice()));
    let looped = [Entry::symlink("a", "b"), Entry::symlink("b", "./a"), Entry::file("a/x", b"")];
    assert!(matches!(entry_error(&looped), EntryError::TooManyLinks));
    // 2^40 steps if every link were to double.
    let mut doubling = vec![Entry::dir("l0")];
    doubling.extend((1..60).map(|i| Entry::symlink(&format!("l{i}"), &format!("l{0}/../l{0}", i - 1))));
    doubling.push(Entry::file("l59/x", b""));
    assert!(matches!(entry_error(&doubling), EntryError::TooManyLinks));
}

#[test]
fn hard_links_need_a_target_that_can_be_linked() {
    let dir = Entry::dir("d");
    assert!(matches!(
        entry_error(&[dir.clone(), Entry::hard_link("l", "d")]),
        EntryError::LinkToDirectory(_)
    ));
    assert!(matches!(entry_error(&[Entry::hard_link("l", "/")]), EntryError::LinkTargetMissing(_)));
    assert!(matches!(entry_error(&[Entry::hard_link("l", "")]), EntryError::LinkTargetMissing(_)));
    let circle = [Entry::hard_link("a", "b"), Entry::hard_link("b", "a")];
    assert!(matches!(entry_error(&circle), EntryError::LinkTargetMissing(_)));
    assert!(matches!(entry_error(&[Entry::hard_link("a", "a")]), EntryError::LinkTargetMissing(_)));
    // A link that takes the place of the directory which holds its target.
    let image = listing(&[tar(&[dir, Entry::file("d/f", b"x"), Entry::hard_link("d", "d/f")])]);
    assert_eq!((image.len(), image[b"d".as_slice()].nlink), (2, 1));
}

#[test]
fn odd_names_and_targets() {
    let long = "x".repeat(256);
    assert!(matches!(entry_error(&[Entry::file(&long, b"")]), EntryError::ComponentTooLong));
    let nested = format!("a/{long}/b");
    assert!(matches!(entry_error(&[Entry::file(&nested, b"")]), EntryError::ComponentTooLong));
    // Through a link, too.
    let through = [Entry::symlink("l", &format!("/{long}")), Entry::file("l/x", b"")];
    assert!(matches!(entry_error(&through), EntryError::ComponentTooLong));
    assert!(matches!(entry_error(&[Entry::symlink("l", "")]), EntryError::LinkTarget));
    let nul = extended(b'x', &record(b"path", b"a\0b"));
    assert!(matches!(archive_error(&[nul, Entry::file("f", b"").plain()]), ArchiveError::ExtendedHeader(_)));
    assert!(matches!(entry_error(&[Entry::file("./", b"")]), EntryError::RootNotDirectory));
    assert!(matches!(entry_error(&[Entry::symlink("/", "x")]), EntryError::RootNotDirectory));
    assert!(matches!(entry_error(&[Entry::file("", b"")]), EntryError::RootNotDirectory));
    let below_file = [Entry::file("f", b""), Entry::file("f/x", b"")];
    assert!(matches!(entry_error(&below_file), EntryError::ParentNotDirectory));
}

#[test]
fn whiteouts_of_nothing_or_of_parents() {
    for name in [".wh.", "d/.wh.", ".wh..", "d/.wh...", "a/b/.wh..."] {
        let entries = [Entry::dir("d"), Entry::file(name, b"")];
        assert!(matches!(entry_error(&entries), EntryError::Whiteout), "{name}");
    }
}

#[test]
fn numbers_out_of_range() {
    let number = |at: usize, bytes: &[u8]| {
        let mut header = Entry::file("f", b"").header();
        header.set(at, bytes);
        archive_error(&[header.finish().to_vec()])
    };
    assert!(matches!(number(124, &binary(-1_i64 as u64, 12)), ArchiveError::Number("size")));
    assert!(matches!(number(124, &[0xff; 12]), ArchiveError::Number("size")));
    assert!(matches!(number(124, b"-0000000001\0"), ArchiveError::Number("size")));
    assert!(matches!(number(108, &binary(1 << 32, 8)), ArchiveError::Number("uid")));
    assert!(matches!(number(108, &binary(u64::from(u32::MAX), 8)), ArchiveError::Number("uid")));
    assert!(matches!(number(116, &binary(-2_i64 as u64, 8)), ArchiveError::Number("gid")));
    assert!(matches!(number(136, b"12x45678901\0"), ArchiveError::Number("mtime")));
    let device = Entry { dev: (4096, 0), ..Entry::new(b'3', "null") };
    assert!(matches!(entry_error(&[device]), EntryError::DeviceNumber { major: 4096, minor: 0 }));
    let uid = extended(b'x', &record(b"uid", b"99999999999999999999"));
    assert!(matches!(archive_error(&[uid, Entry::file("f", b"").plain()]), ArchiveError::Number("uid")));
}

#[test]
fn damaged_archives() {
    let good = Entry::file("f", &[1; 2000]).pax();
    for cut in [1, 100, 511, 513, 600, 2511] {
        let source = match build(&[good[..cut].to_vec()]).unwrap_err() {
            UnpackError::Archive { source, .. } => source,
            other => panic!("{other:?}"),
        };
        assert!(matches!(source, ArchiveError::TruncatedHeader | ArchiveError::TruncatedContent), "{cut}");
    }
    let mut flipped = good.clone();
    flipped[3] ^= 1;
    assert!(matches!(archive_error(&[flipped]), ArchiveError::Checksum));
    assert!(matches!(archive_error(&[Entry::new(b'V', "label").pax()]), ArchiveError::EntryType(b'V')));
    assert!(matches!(archive_error(&[vec![b'x'; 4096]]), ArchiveError::Number("checksum")));
}

#[test]
fn sparse_maps_that_lie() {
    let case = |map: &str, size: &str, stored: usize| {
        let records =
            [record(b"GNU.sparse.map", map.as_bytes()), record(b"GNU.sparse.size", size.as_bytes())];
        archive_error(&[extended(b'x', &records.concat()), Entry::file("f", &vec![1; stored]).plain()])
    };
    for (map, size, stored) in [
        ("0,10,5,10", "100", 20),
        ("90,20", "100", 20),
        ("18446744073709551615,2", "100", 2),
        ("0,10", "100", 20),
        ("0,20", "100", 10),
        ("0", "100", 0),
        ("0,-1", "100", 0),
        ("", "100", 0),
        ("0,1", "", 1),
    ] {
        assert!(matches!(case(map, size, stored), ArchiveError::SparseMap(_)), "{map} {size}");
    }
    let one = |text: &str| {
        let records = [
            record(b"GNU.sparse.major", b"1"),
            record(b"GNU.sparse.minor", b"0"),
            record(b"GNU.sparse.realsize", b"100"),
        ];
        error(&[extended(b'x', &records.concat()), Entry::file("f", &padded(text.as_bytes())).plain()])
    };
    for text in ["3\n0\n", "x\n", "999999999999999999999999\n", "\n", &"1\n".repeat(1000)] {
        let source = std::error::Error::source(&one(text)).unwrap().to_string();
        assert!(source.contains("sparse"), "{text:.20}: {source}");
    }
    assert!(matches!(one("9999999999\n"), UnpackError::Limit { .. }));
}

#[test]
fn everything_that_grows_is_bounded() {
    let default = Limits::default();
    let many: Vec<_> = (0..20).map(|i| Entry::file(&format!("f{i}"), b"")).collect();
    assert_eq!(limit(&[tar(&many)], &Limits { max_entries: 19, ..default.clone() }), "entries");
    let deep = tar(&[Entry::file(&"d/".repeat(30), b"")]);
    assert_eq!(limit(&[deep], &Limits { max_entries: 19, ..default.clone() }), "entries");
    assert_eq!(
        limit(&[tar(&many)], &Limits { max_uncompressed_bytes: 1000, ..default.clone() }),
        "uncompressed bytes"
    );
    let big = tar(&[Entry::file("big", &[1; 100_000])]);
    assert_eq!(limit(&[big], &Limits { max_image_bytes: 50_000, ..default.clone() }), "bytes in the image");
    assert_eq!(
        limit(&[tar(&many)], &Limits { max_metadata_bytes: 20, ..default.clone() }),
        "bytes of names and attributes"
    );
    let long = tar(&[Entry::file(&"d/".repeat(3000), b"")]);
    assert_eq!(limit(&[long], &default), "bytes in a path");
    let long = tar(&[Entry::symlink("l", &"d/".repeat(3000))]);
    assert_eq!(limit(&[long], &default), "bytes in a link");
    let layers = vec![tar(&[]); 4];
    assert_eq!(limit(&layers, &Limits { max_layers: 3, ..default.clone() }), "layers");
    let xattrs = vec![(b"user.x".to_vec(), vec![0; 60_000]), (b"user.y".to_vec(), vec![0; 60_000])];
    let fat = tar(&[Entry { xattrs, ..Entry::file("f", b"") }]);
    assert_eq!(limit(&[fat], &default), "bytes of extended attributes of a file");
    let mut huge = Entry::new(b'x', "x").header();
    huge.octal(124, 12, 1 << 30);
    assert_eq!(limit(&[huge.finish().to_vec()], &default), "bytes in an extended header");
    let records = [record(b"GNU.sparse.map", b"0,1"), record(b"GNU.sparse.size", b"9223372036854775807")];
    let giant = archive(&[extended(b'x', &records.concat()), Entry::file("f", b"x").plain()]);
    assert_eq!(limit(&[giant], &default), "bytes in one file");
    let xattrs = vec![(b"user.x".to_vec(), vec![0; 3000])];
    let root = entry_error(&[Entry { xattrs, ..Entry::dir("./") }]);
    assert!(matches!(root, EntryError::RootXattrs { .. }));
}

#[test]
fn a_bomb_stops_at_its_limit() {
    let mut bomb = Vec::new();
    let zeros = io::repeat(0).take(4 << 20);
    flate2::read::GzEncoder::new(zeros, flate2::Compression::fast()).read_to_end(&mut bomb).unwrap();
    let limits = Limits { max_uncompressed_bytes: 1 << 20, ..Limits::default() };
    assert_eq!(limit(&[bomb], &limits), "uncompressed bytes");
}

#[test]
fn whiteouts_of_deep_trees_cost_no_more_than_their_size() {
    // A chain of directories much deeper than any path, and an opaque whiteout at every level from the bottom up.
    let mut entries = Vec::new();
    for i in 0..300 {
        let prefix = if i == 0 { String::new() } else { "deep/".to_string() };
        entries.push(Entry::dir(&format!("{prefix}{}", "d/".repeat(50))));
        let target = format!("{}{}", if i == 0 { "/" } else { "/deep/" }, "d/".repeat(50));
        // The link is made again each time, one step lower: its old target is resolved first.
        entries.push(Entry::symlink(&format!("deep{i}"), &target));
    }
    let layers = [tar(&entries), tar(&vec![Entry::file("d/d/d/.wh..wh..opq", b""); 5000])];
    assert!(listing(&layers).len() > 300);
}

#[test]
fn the_whole_stream_is_verified() {
    let layer = [tar(&[Entry::file("f", b"x")]), vec![1; 100_000]].concat();
    let run = |diff_id: [u8; 32]| {
        let input = LayerInput { reader: layer.as_slice(), compression: Compression::None, diff_id };
        unpack([Ok::<_, Infallible>(input)], &mut Vec::new(), &Limits::default(), &mut |_| {})
    };
    let wrong = run([7; 32]).unwrap_err();
    assert!(matches!(wrong, UnpackError::Digest { layer: 0, .. }) && wrong.is_image_fault());
    let of_archive_only = sha2::Digest::finalize(sha2::Digest::chain_update(
        <sha2::Sha256 as sha2::Digest>::new(),
        &layer[..layer.len() - 1],
    ));
    assert!(run(of_archive_only.into()).is_err());
    assert!(run(<sha2::Sha256 as sha2::Digest>::digest(&layer).into()).is_ok());
}

/// Fails after some bytes.
struct Failing<T> {
    inner: T,
    left: usize,
}

impl<R: Read> Read for Failing<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        let n = buf.len().min(self.left);
        let n = self.inner.read(&mut buf[..n])?;
        self.left -= n;
        Ok(n)
    }
}

impl<S: BlockSink> BlockSink for Failing<S> {
    fn write_all_at(&mut self, data: &[u8], offset: u64) -> io::Result<()> {
        if self.left == 0 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.left -= 1;
        self.inner.write_all_at(data, offset)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.inner.sync()
    }
}

#[test]
fn a_torn_image_has_no_superblock() {
    let layer = tar(&[Entry::file("f", &vec![1; 2 << 20]), Entry::dir("d")]);
    let diff_id = <sha2::Sha256 as sha2::Digest>::digest(&layer).into();
    let (stale, _) = build(&[tar(&[Entry::dir("stale")])]).unwrap();
    let mut writes = 1;
    loop {
        let mut sink = Failing { inner: stale.clone(), left: writes };
        let input = LayerInput { reader: layer.as_slice(), compression: Compression::None, diff_id };
        let result = unpack([Ok::<_, Infallible>(input)], &mut sink, &Limits::default(), &mut |_| {});
        if let Ok(summary) = result {
            sink.inner.truncate(summary.image_bytes as usize);
            assert_eq!(erofs::read(&sink.inner).len(), 3);
            break;
        }
        let error = result.unwrap_err();
        assert!(matches!(error, UnpackError::Output { .. }) && !error.is_image_fault());
        assert_eq!(sink.inner[1024..1028], [0; 4], "after {writes} writes");
        writes += 1;
    }
    assert!(writes >= 5);
    let reader = Failing { inner: layer.as_slice(), left: 5000 };
    let input = LayerInput { reader, compression: Compression::Detect, diff_id };
    let error =
        unpack([Ok::<_, Infallible>(input)], &mut Vec::new(), &Limits::default(), &mut |_| {}).unwrap_err();
    assert!(
        matches!(error, UnpackError::Archive { source: ArchiveError::Read(_), .. })
            && !error.is_image_fault()
    );
    let none: [Result<LayerInput<&[u8]>, io::Error>; 1] = [Err(io::ErrorKind::NotFound.into())];
    let error = unpack(none, &mut Vec::new(), &Limits::default(), &mut |_| {}).unwrap_err();
    assert!(matches!(error, UnpackError::NextLayer { layer: 0, .. }));
}

/// Archives with random damage: whatever comes out must be an error or an image that reads back whole.
#[test]
fn damage_never_gives_a_broken_image() {
    let mut random = Random(2024);
    let (mut good, mut bad) = (0, 0);
    for _ in 0..300 {
        let mut layer = archive(&[
            Entry { xattrs: vec![(b"user.a".to_vec(), b"b".to_vec())], ..Entry::file("dir/file", &[5; 700]) }
                .pax(),
            Entry::hard_link("dir/hard", "dir/file").gnu(),
            Entry::symlink("link", "dir").pax(),
            Entry { dev: (1, 3), ..Entry::new(b'3', "link/null") }.pax(),
            extended(
                b'x',
                &[record(b"GNU.sparse.map", b"0,3,9000,2"), record(b"GNU.sparse.size", b"9100")].concat(),
            ),
            Entry::file("sparse", b"abcde").plain(),
            Entry::file(&"l/".repeat(90), b"long").gnu(),
        ]);
        for _ in 0..=random.below(3) {
            let at = random.below(layer.len() as u64) as usize;
            let header = at / 512 * 512;
            layer[at] = random.next() as u8;
            if random.one_in(2) {
                // With a checksum that fits, damage gets further.
                let mut block = Header([0; 512]);
                block.set(0, &layer[header..header + 512]);
                layer[header..header + 512].copy_from_slice(&block.finish());
            }
        }
        match build(&[layer]) {
            Ok((image, _)) => {
                erofs::read(&image);
                good += 1;
            }
            Err(error) => {
                assert!(error.is_image_fault(), "{error:?}");
                bad += 1;
            }
        }
    }
    assert!(good > 20 && bad > 20, "{good} good, {bad} bad");
}
