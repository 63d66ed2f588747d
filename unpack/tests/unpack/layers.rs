//! How layers lie upon each other.

use std::convert::Infallible;
use std::io::Write;

use hyper_unpack::{Compression, LayerInput, Limits, Progress, unpack};
use sha2::{Digest, Sha256};

use crate::support::archive::{Entry, tar};
use crate::support::{Content, Listing, build, erofs, listing};

fn names(listing: &Listing) -> Vec<&str> {
    listing.keys().filter(|path| !path.is_empty()).map(|path| std::str::from_utf8(path).unwrap()).collect()
}

fn entries(list: &[&str]) -> Vec<u8> {
    let entry = |name: &&str| match name.strip_suffix('/') {
        Some(name) => Entry::dir(name),
        None => Entry::file(name, name.as_bytes()),
    };
    tar(&list.iter().map(entry).collect::<Vec<_>>())
}

#[test]
fn names_are_taken_relative_to_the_root() {
    let root = Entry { mode: 0o700, uid: 5, ..Entry::dir("./") };
    let rest = ["./a", "/abs", "x/../b", "implied//dir/./c", "d/"].map(|name| Entry::file(name, b""));
    let image = listing(&[tar(&[&[root], rest.as_slice()].concat())]);
    assert_eq!(names(&image), ["a", "abs", "b", "d", "implied", "implied/dir", "implied/dir/c"]);
    assert_eq!((image[b"".as_slice()].mode, image[b"".as_slice()].uid), (0o700, 5));
    let implied = &image[b"implied/dir".as_slice()];
    assert_eq!((implied.mode, implied.uid, implied.mtime), (0o755, 0, (0, 0)));
}

#[test]
fn whiteouts_hide_older_layers_only_wherever_they_stand() {
    let lower = entries(&["d/", "d/old", "d/sub/", "d/sub/old", "f", "keep"]);
    for upper in [
        ["d/.wh..wh..opq", "d/new", "d/sub/new", ".wh.f", "f"],
        ["d/new", "d/sub/new", "d/.wh..wh..opq", "f", ".wh.f"],
    ] {
        let image = listing(&[lower.clone(), entries(&upper)]);
        assert_eq!(names(&image), ["d", "d/new", "d/sub", "d/sub/new", "f", "keep"]);
    }
    let image = listing(&[lower.clone(), entries(&[".wh.d", ".wh.none", "none/.wh.x", "none/.wh..wh..opq"])]);
    assert_eq!(names(&image), ["f", "keep"]);
    // A directory that was hidden and made again has nothing of the old one.
    let again = entries(&["d/", "d/sub/", ".wh.d"]);
    assert_eq!(names(&listing(&[lower.clone(), again])), ["d", "d/sub", "f", "keep"]);
    // Hidden in one layer, back in the next.
    let image = listing(&[lower, entries(&[".wh.d"]), entries(&["d/x"])]);
    assert_eq!(names(&image), ["d", "d/x", "f", "keep"]);
}

#[test]
fn names_that_only_look_like_whiteouts() {
    let lower = entries(&["wh.x", "a.wh.b", "p/x"]);
    let image = listing(&[lower, entries(&[".wh..wh.plnk/1.2", ".wh..wh.aufs", "p/.wh.x"])]);
    assert_eq!(names(&image), ["a.wh.b", "p", "wh.x"]);
}

#[test]
fn entries_replace_each_other() {
    let lower = entries(&["d/", "d/x", "f"]);
    let image = listing(&[lower.clone(), entries(&["d", "f/"])]);
    assert_eq!(names(&image), ["d", "f"]);
    assert_eq!(image[b"f".as_slice()].content, Content::Directory);
    // A directory over a directory keeps what is in it; a link to one is replaced, not followed.
    let metadata = Entry { mode: 0o1777, gid: 9, ..Entry::dir("d") };
    let link = Entry::symlink("l", "d");
    let image = listing(&[lower, tar(&[metadata, link]), entries(&["l/"])]);
    assert_eq!((image[b"d".as_slice()].mode, image[b"d".as_slice()].gid), (0o1777, 9));
    assert_eq!(names(&image), ["d", "d/x", "f", "l"]);
    assert_eq!(image[b"l".as_slice()].content, Content::Directory);
    // Within a layer the last entry of a name wins.
    let twice = tar(&[Entry::file("f", b"one"), Entry::file("f", b"two")]);
    assert_eq!(listing(&[twice])[b"f".as_slice()].content, Content::File(b"two".to_vec()));
}

#[test]
fn parents_that_are_links_are_followed_in_the_tree() {
    let lower =
        tar(&[Entry::dir("usr/lib"), Entry::symlink("lib", "usr/lib"), Entry::symlink("up", "../../etc")]);
    let image = listing(&[lower, entries(&["lib/a", "up/passwd"])]);
    assert_eq!(names(&image), ["etc", "etc/passwd", "lib", "up", "usr", "usr/lib", "usr/lib/a"]);
}

#[test]
fn a_file_gives_way_to_a_directory_of_a_newer_layer() {
    let image = listing(&[entries(&["a"]), entries(&["a/b", ".wh.a"])]);
    assert_eq!(names(&image), ["a", "a/b"]);
}

#[test]
fn hard_links_share_their_inode() {
    let lower = tar(&[
        Entry::file("dir/target", &[1; 10_000]),
        Entry::symlink("sym", "nowhere"),
        Entry::file("small", b"small"),
    ]);
    let upper = tar(&[
        Entry::hard_link("one", "dir/target"),
        Entry::hard_link("two", "./one"),
        Entry::hard_link("sym2", "/sym"),
        Entry::hard_link("small2", "small"),
        Entry::hard_link("small2", "small2"),
        Entry::file("dir/.wh.target", b""),
    ]);
    let image = listing(&[lower.clone(), upper.clone()]);
    assert_eq!(names(&image), ["dir", "one", "small", "small2", "sym", "sym2", "two"]);
    let node = |path: &str| image[path.as_bytes()].clone();
    assert_eq!(node("one"), node("two"));
    assert_eq!((node("one").nlink, node("small2").nlink, node("sym2").nlink), (2, 2, 2));
    assert_eq!(node("sym2").content, Content::Symlink(b"nowhere".to_vec()));
    // The last name to go takes the inode with it.
    let rest = entries(&[".wh.one", ".wh.two", ".wh.small"]);
    let (bytes, summary) = build(&[lower, upper, rest]).unwrap();
    let image = erofs::read(&bytes);
    assert_eq!(image[b"small2".as_slice()].nlink, 1);
    assert_eq!(summary.dead_bytes, 8192);
    assert_eq!(summary.inodes, 4);
}

#[test]
fn small_files_replaced_across_segments_keep_their_links_straight() {
    // Enough small files for several segments; links are added and removed after their segment was written.
    let name = |i: u32| format!("f{i}");
    let files: Vec<_> = (0..3000).map(|i| Entry::file(&name(i), &[i as u8; 1500])).collect();
    let links: Vec<_> = (0..3000).step_by(7).map(|i| Entry::hard_link(&format!("l{i}"), &name(i))).collect();
    let gone: Vec<_> = (0..3000).step_by(14).map(|i| Entry::file(&format!(".wh.{}", name(i)), b"")).collect();
    let again: Vec<_> = (0..3000).step_by(5).map(|i| Entry::file(&name(i), b"again")).collect();
    let image = listing(&[tar(&files), tar(&links), tar(&gone), tar(&again)]);
    assert_eq!(image[b"l7".as_slice()].nlink, 2);
    assert_eq!(image[b"l14".as_slice()].content, Content::File(vec![14; 1500]));
    assert_eq!(image[b"l14".as_slice()].nlink, 1);
    assert_eq!(image[b"f5".as_slice()].content, Content::File(b"again".to_vec()));
}

#[test]
fn compressed_layers_and_progress() {
    let layers = [entries(&["a", "b"]), tar(&[Entry::file("big", &vec![3; 5 << 20])])];
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&layers[0]).unwrap();
    let gzip = gzip.finish().unwrap();
    let zstd =
        ruzstd::encoding::compress_to_vec(layers[1].as_slice(), ruzstd::encoding::CompressionLevel::Fastest);
    let stored = [(gzip, Compression::Gzip), (zstd, Compression::Detect)];
    let inputs = stored.iter().zip(&layers).map(|((stored, compression), tar)| {
        let diff_id = Sha256::digest(tar).into();
        Ok::<_, Infallible>(LayerInput { reader: stored.as_slice(), compression: *compression, diff_id })
    });
    let mut image = Vec::new();
    let mut reports = Vec::new();
    let summary = unpack(inputs, &mut image, &Limits::default(), &mut |report| reports.push(report)).unwrap();
    assert_eq!(names(&erofs::read(&image)), ["a", "b", "big"]);
    assert_eq!(summary.layers, 2);
    assert_eq!(summary.uncompressed_bytes, layers.concat().len() as u64);
    let last = Progress {
        layer: 1,
        stored_bytes: stored[1].0.len() as u64,
        uncompressed_bytes: layers[1].len() as u64,
        entries: 3,
    };
    assert_eq!(reports.last(), Some(&last));
    assert!((6..20).contains(&reports.len()), "{} reports", reports.len());
}
