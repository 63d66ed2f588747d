//! Death by SIGABRT at every fault point, in a process of its own, and what the next process finds.

use std::path::Path;
use std::process::Command;

use super::*;
use crate::fault::CRASH_AT;
use crate::load::{LoadOptions, load};
use crate::store::disk::DiskEntry;
use crate::store::images::Used;
use crate::testing::registry::Server;

const SCENARIO: &str = "HYPER_IMAGE_TEST_SCENARIO";
const ROOT: &str = "HYPER_IMAGE_TEST_ROOT";
const IMAGE: &str = "HYPER_IMAGE_TEST_IMAGE";
/// More points than any scenario has.
const MAX_POINTS: u32 = 200;

fn sample() -> Sample {
    Sample::new(1, "amd64", &[80_000, 100])
}

/// Not a test of its own: what the child processes run.
#[tokio::test]
async fn child() {
    let Ok(scenario) = std::env::var(SCENARIO) else { return };
    let store = Store::open(Path::new(&std::env::var(ROOT).unwrap())).unwrap();
    let image = std::env::var(IMAGE).unwrap();
    match scenario.as_str() {
        "pull" => {
            pull(&store, &Reference::parse(&image).unwrap(), &options()).await.unwrap();
        }
        "load" => {
            let archive = std::io::Cursor::new(std::fs::read(&image).unwrap());
            load(&store, archive, &LoadOptions::default()).await.unwrap();
        }
        "disk" => match store
            .disk(&store.resolve(&image).unwrap(), "test-1", std::time::Duration::ZERO)
            .await
            .unwrap()
        {
            DiskEntry::Ready(_) => {}
            DiskEntry::Build(build) => {
                std::fs::write(build.path(), b"a disk").unwrap();
                build.commit().await.unwrap();
            }
        },
        "remove" => {
            store.remove(&image, false, &Used::default()).unwrap();
        }
        other => panic!("{other}"),
    }
}

/// Runs a child that dies at point `at`; true if it survived because there is no such point.
fn survives(scenario: &str, root: &Path, image: &str, at: u32) -> bool {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "pull::tests::crash::child", "--nocapture", "--test-threads=1"])
        .env(SCENARIO, scenario)
        .env(ROOT, root)
        .env(IMAGE, image)
        .env(CRASH_AT, at.to_string())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!text.contains("panicked"), "{scenario} at {at}: {text}");
    output.status.success()
}

/// Every blob is what it is named, every image is whole.
fn check(root: &Path) -> Store {
    let store = Store::open(root).unwrap();
    blobs(root);
    let index = store.index().unwrap();
    for (id, record) in &index.images {
        let image = store.load_image(&index, id, record).unwrap();
        store.layer_blobs(&image).unwrap();
    }
    assert!(index.references.values().all(|id| index.images.contains_key(id)));
    assert!(leftovers(root).iter().all(|name| name.ends_with(".partial")), "{:?}", leftovers(root));
    store
}

/// What is left when all is done is exactly one image and nothing else.
fn check_tidy(store: &Store, count: usize) {
    let report = store.gc(&Used::default()).unwrap();
    assert!(!report.deferred);
    assert_eq!((leftovers(store.root()), blobs(store.root())), (vec![], count));
}

/// Tries a scenario with a death at each point in turn, each in a store prepared afresh.
async fn at_each_point(
    scenario: &str,
    image: &str,
    prepare: impl AsyncFn(&Store),
    after: impl AsyncFn(&Store),
) -> u32 {
    for at in 1..MAX_POINTS {
        let (dir, store) = store();
        prepare(&store).await;
        drop(store);
        let done = {
            let (scenario, image, root) = (scenario.to_owned(), image.to_owned(), dir.path().to_owned());
            tokio::task::spawn_blocking(move || survives(&scenario, &root, &image, at)).await.unwrap()
        };
        let store = check(dir.path());
        after(&store).await;
        if done {
            return at - 1;
        }
    }
    panic!("{scenario} never ends");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pull_that_dies_anywhere_is_finished_by_the_next() {
    let server = Server::start().await;
    let reference = server.offer(&sample(), "a:1");
    let image = reference.full();
    let points = at_each_point(
        "pull",
        &image,
        async |_| {},
        async |store| {
            let pulled = pull(store, &reference, &options()).await.unwrap();
            assert_eq!(pulled.image.id, sample().id());
            check_tidy(store, 4);
        },
    )
    .await;
    assert!(points > 12, "only {points} points");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_load_that_dies_anywhere_is_finished_by_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.tar");
    let archive = crate::load::tests::docker_archive(&sample(), "a:1");
    std::fs::write(&path, &archive).unwrap();
    let points = at_each_point(
        "load",
        path.to_str().unwrap(),
        async |_| {},
        async |store| {
            load(store, std::io::Cursor::new(archive.clone()), &LoadOptions::default()).await.unwrap();
            check_tidy(store, 4);
        },
    )
    .await;
    assert!(points > 8, "only {points} points");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_is_whole_or_not_there() {
    let server = Server::start().await;
    let reference = server.offer(&sample(), "a:1");
    let points = at_each_point(
        "disk",
        "127.0.0.1:1/a:1",
        async |store| {
            pull(store, &reference, &options()).await.unwrap();
            store.tag(&reference.full(), &Reference::parse("127.0.0.1:1/a:1").unwrap()).unwrap();
        },
        async |store| {
            let image = store.resolve(&reference.full()).unwrap();
            match store.disk(&image, "test-1", std::time::Duration::ZERO).await.unwrap() {
                DiskEntry::Ready(path) => assert_eq!(std::fs::read(path).unwrap(), b"a disk"),
                DiskEntry::Build(build) => {
                    assert_eq!(std::fs::read_dir(store.disks_dir()).unwrap().count(), 1, "{build:?}")
                }
            }
        },
    )
    .await;
    assert!(points >= 3, "only {points} points");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removal_that_dies_is_finished_by_a_collection() {
    let server = Server::start().await;
    let reference = server.offer(&sample(), "a:1");
    let points = at_each_point(
        "remove",
        &reference.full(),
        async |store| {
            pull(store, &reference, &options()).await.unwrap();
        },
        async |store| {
            if store.images().unwrap().is_empty() {
                check_tidy(store, 0);
            } else {
                check_tidy(store, 4);
            }
        },
    )
    .await;
    assert!(points > 5, "only {points} points");
}
