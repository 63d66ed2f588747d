//! Random layers, unpacked and compared with the naive model: every name, attribute and byte.

use crate::support::archive::{Entry, archive};
use crate::support::model::Model;
use crate::support::random::Random;
use crate::support::{assert_same, build, erofs, fsck};

const NAMES: [&str; 7] = ["a", "b", "c", "d.d", "+", "-long-name-that-sorts-before-dots", "é"];
const TARGETS: [&str; 9] = ["a", "b", "/", "..", "../b", "/a/b", "../../../../c", "d.d/a", "./+"];

fn path(random: &mut Random, max_depth: u64) -> String {
    let depth = 1 + random.below(max_depth);
    (0..depth).map(|_| random.pick(&NAMES)).collect::<Vec<_>>().join("/")
}

fn data(random: &mut Random) -> Vec<u8> {
    let len = match random.below(8) {
        0 => 0,
        1..=4 => random.below(3000),
        5 => 4000 + random.below(200),
        6 => random.below(20_000),
        _ => 4096 * random.below(3),
    };
    let mut data = random.bytes(len as usize);
    if random.one_in(10) {
        // A hole, large enough or just not, with something around it.
        let zeros = vec![0; (60 << 10) + random.below(16 << 10) as usize];
        data = [data.as_slice(), &zeros, &random.bytes(random.0 as usize % 100)].concat();
    }
    data
}

fn entry(random: &mut Random) -> Entry {
    let name = path(random, 4);
    let mut entry = match random.below(20) {
        0..=6 => Entry::file(&name, &data(random)),
        7..=9 => Entry::dir(&name),
        10 | 11 => Entry::symlink(&name, random.pick(&TARGETS)),
        12 | 13 => Entry::hard_link(&name, &path(random, 4)),
        14..=16 => {
            let (parent, base) = name.rsplit_once('/').unwrap_or(("", &name));
            let slash = if parent.is_empty() { "" } else { "/" };
            Entry::file(&format!("{parent}{slash}.wh.{base}"), b"")
        }
        17 => Entry::file(&format!("{name}/.wh..wh..opq"), b""),
        18 => Entry::new(b'6', &name),
        _ => {
            let kind = random.pick(b"34");
            let dev = (random.below(4096) as u32, random.below(1 << 20) as u32);
            Entry { dev, ..Entry::new(kind, &name) }
        }
    };
    entry.mode = random.below(0o10000) as u32;
    entry.uid = if random.one_in(5) { random.next() as u32 >> 1 } else { 1000 };
    entry.gid = random.below(70_000) as u32;
    if random.one_in(4) {
        entry.mtime = (random.below(1 << 33).cast_signed() - (1 << 32), random.below(1_000_000_000) as u32);
    }
    if random.one_in(6) {
        let value = random.below(40) as usize;
        entry.xattrs = vec![(b"user.x".to_vec(), random.bytes(value)), (b"security.y".to_vec(), vec![0, 10])];
    }
    entry
}

#[test]
fn images_hold_what_the_model_holds() {
    let mut fscks = 0;
    for seed in 0..80 {
        let mut random = Random(seed);
        let mut model = Model::new();
        let mut layers = Vec::new();
        for layer in 1..=1 + random.below(5) as usize {
            let mut parts = Vec::new();
            for _ in 0..random.below(40) {
                let entry = entry(&mut random);
                if model.accepts(layer, &entry) {
                    parts.push(if random.one_in(3) && entry.xattrs.is_empty() && entry.mtime.1 == 0 {
                        entry.gnu()
                    } else {
                        entry.pax()
                    });
                    model.apply(layer, &entry);
                }
            }
            layers.push(archive(&parts));
        }
        let (image, _) = build(&layers).unwrap();
        assert_same(&erofs::read(&image), &model.listing(), &format!("seed {seed}"));
        if seed % 20 == 0 && fsck(&image) {
            fscks += 1;
        }
    }
    assert!(fscks == 0 || fscks == 4);
}

#[test]
fn the_same_layers_give_the_same_image() {
    let mut random = Random(7);
    let layer: Vec<_> = (0..200)
        .map(|i| Entry { path: format!("d{}/{i}", i % 9).into(), ..entry(&mut random) })
        .filter(|entry| entry.kind != b'1')
        .map(|entry| entry.pax())
        .collect();
    let layers = [archive(&layer), archive(&layer[20..60])];
    let (one, summary) = build(&layers).unwrap();
    let (two, again) = build(&layers).unwrap();
    assert!(one == two);
    assert_eq!(summary, again);
    assert!(summary.dead_bytes > 0);
}

#[test]
fn large_directories_are_found_by_bisection() {
    let mut random = Random(11);
    let mut model = Model::new();
    let mut layer = Vec::new();
    for i in 0..800_u32 {
        let name = format!("{:x}{}", random.next(), "n".repeat(i as usize % 230));
        let entry = Entry::file(&format!("big/{name}"), &i.to_le_bytes());
        model.apply(1, &entry);
        layer.push(entry.pax());
    }
    let (image, _) = build(&[archive(&layer)]).unwrap();
    assert_same(&erofs::read(&image), &model.listing(), "big directory");
    fsck(&image);
}
