//! Pulls against a registry that misbehaves in every way we know of.

use std::sync::{Arc, Mutex};

use super::*;
use crate::testing::registry::{Demand, Fault, PASSWORD, Server, USER};
use crate::testing::{INDEX, MANIFEST, Sample, blobs, descriptor, index, leftovers, manifest, noise, store};

mod crash;
mod hostile;

/// Remembers all layer states in order.
#[derive(Default)]
struct Recorder(Mutex<Vec<(Digest, LayerState)>>);

impl Progress for Recorder {
    fn event(&self, event: &Event<'_>) {
        if let Event::Layer { digest, state } = event {
            self.0.lock().unwrap().push(((*digest).clone(), *state));
        }
    }
}

impl Recorder {
    fn labels(&self, layer: &[u8]) -> Vec<&'static str> {
        let mut labels: Vec<_> = self
            .0
            .lock()
            .unwrap()
            .iter()
            .filter(|(d, _)| *d == Digest::of(layer))
            .map(|(_, s)| s.label())
            .collect();
        labels.dedup();
        labels
    }
}

fn options() -> PullOptions {
    PullOptions {
        auth: Auth::Anonymous,
        patience: Patience { connect_ms: 5000, stall_ms: 5000, tries: 3, backoff_ms: 1, max_backoff_ms: 2 },
        ..PullOptions::default()
    }
}

fn user() -> PullOptions {
    PullOptions { auth: Auth::Basic { username: USER.into(), password: PASSWORD.into() }, ..options() }
}

async fn fails(store: &Store, reference: &Reference) -> String {
    let line = pull(store, reference, &options()).await.unwrap_err().one_line();
    assert!(line.len() < 500 && !line.contains('\n') && !line.contains('\x1b'), "{line}");
    assert!(store.images().unwrap().is_empty(), "a failed pull left an image");
    line
}

#[tokio::test]
async fn pulls_then_is_up_to_date() {
    let (server, (dir, store)) = (Server::start().await, store());
    let sample = Sample::new(1, "amd64", &[10, 300_000, 0, 500]);
    let reference = server.offer(&sample, "a/b:1");
    let recorder = Arc::new(Recorder::default());
    let options = PullOptions { progress: recorder.clone(), ..options() };
    let pulled = pull(&store, &reference, &options).await.unwrap();
    assert!(pulled.changed);
    assert_eq!((pulled.digest, pulled.image.id.clone()), (sample.digest(), sample.id()));
    assert_eq!(pulled.image.references, std::slice::from_ref(&reference));
    assert_eq!(pulled.image.config.env, ["SEED=1"]);
    assert_eq!(pulled.image.layers.len(), 4);
    for (blob, layer) in store.layer_blobs(&pulled.image).unwrap().iter().zip(&sample.layers) {
        assert_eq!(std::fs::read(&blob.path).unwrap(), *layer);
    }
    let whole =
        ["Pulling fs layer", "Downloading", "Verifying Checksum", "Download complete", "Pull complete"];
    assert_eq!(recorder.labels(&sample.layers[1]), whole);
    assert_eq!((leftovers(dir.path()), blobs(dir.path())), (vec![], 6));
    let before = server.content().seen.len();
    recorder.0.lock().unwrap().clear();
    assert!(!pull(&store, &reference, &options).await.unwrap().changed);
    assert_eq!(server.content().seen.len(), before + 1, "only the manifest is asked for again");
    assert_eq!(recorder.labels(&sample.layers[1]), ["Already exists"]);
    let pinned = reference.with_digest(sample.digest());
    assert_eq!(pull(&store, &pinned, &options).await.unwrap().image.id, sample.id());
    assert_eq!(server.content().seen.len(), before + 1, "a digest needs no registry");
}

#[tokio::test]
async fn a_tag_moves_and_layers_are_shared() {
    let (server, (_dir, store)) = (Server::start().await, store());
    let (old, new) = (Sample::new(1, "amd64", &[100, 200]), Sample::new(2, "amd64", &[200, 300]));
    assert_eq!(old.layers[1], new.layers[0]);
    let reference = server.offer(&old, "a:1");
    pull(&store, &reference, &options()).await.unwrap();
    server.offer(&new, "a:1");
    let pulled = pull(&store, &reference, &options()).await.unwrap();
    assert!(pulled.changed && pulled.image.id == new.id());
    assert_eq!(server.blob_requests(&old.layers[1]).len(), 1);
    let old = store.resolve(&old.id().to_string()).unwrap();
    assert!(old.references.is_empty() && old.repo_digests.len() == 1);
}

#[tokio::test]
async fn basic_auth() {
    let (server, (_dir, store)) = (Server::start().await, store());
    let reference = server.offer(&Sample::new(1, "amd64", &[100]), "a:1");
    server.content().demand = Demand::Basic;
    let line = fails(&store, &reference).await;
    assert!(
        line.starts_with("pull access denied for 127.0.0.1:") && line.contains("'docker login'"),
        "{line}"
    );
    pull(&store, &reference, &user()).await.unwrap();
}

#[tokio::test]
async fn tokens_are_fetched_shared_and_renewed() {
    for (uses, concurrency) in [(1, 1), (2, 1), (4, 2), (100, 3)] {
        let (server, (_dir, store)) = (Server::start().await, store());
        let reference = server.offer(&Sample::new(1, "amd64", &[100; 8]), "a:1");
        server.content().demand = Demand::Token(uses);
        let options = PullOptions { concurrency, ..user() };
        pull(&store, &reference, &options).await.unwrap();
        let tokens = server.content().seen.iter().filter(|seen| seen.path.starts_with("/token")).count();
        assert!(if uses == 100 { tokens == 1 } else { tokens > 1 }, "{uses} {tokens}");
        let asked =
            server.content().seen.iter().find(|seen| seen.path.starts_with("/token")).unwrap().path.clone();
        assert_eq!(asked, "/token?x=y&service=test&scope=repository%3Aa%3Apull");
    }
}

#[tokio::test]
async fn wrong_credentials_are_denied() {
    let (server, (_dir, store)) = (Server::start().await, store());
    let reference = server.offer(&Sample::new(1, "amd64", &[100]), "a:1");
    let wrong =
        PullOptions { auth: Auth::Basic { username: "x".into(), password: "hush".into() }, ..options() };
    for demand in [Demand::Basic, Demand::Token(9)] {
        server.content().demand = demand;
        let line = pull(&store, &reference, &wrong).await.unwrap_err().one_line();
        assert!(line.starts_with("pull access denied for ") && !line.contains("hush"), "{line}");
    }
}

#[tokio::test]
async fn credentials_do_not_follow_redirects() {
    let (server, other, (_dir, store)) = (Server::start().await, Server::start().await, store());
    let sample = Sample::new(1, "amd64", &[100, 200]);
    let reference = server.offer(&sample, "a:1");
    other.offer_blobs(&sample);
    server.content().demand = Demand::Basic;
    let path = format!("/v2/a/blobs/{}", Digest::of(&sample.layers[0]));
    // The first request is challenged before the fault is looked at.
    server.fail(&sample.layers[0], [Fault::Redirect(format!("http://{}{path}?sig=1", other.address))]);
    other
        .content()
        .blobs
        .insert(format!("{}?sig=1", Digest::of(&sample.layers[0])), sample.layers[0].clone());
    server.fail(&sample.layers[1], [Fault::RedirectHere("/v2/moved/blobs/x".into())]);
    server.content().blobs.insert("x".into(), sample.layers[1].clone());
    pull(&store, &reference, &user()).await.unwrap();
    let there = other.content().seen.clone();
    assert_eq!(there.len(), 1);
    assert!(!there[0].headers.contains_key("authorization"), "{there:?}");
    assert!(server.requests("/v2/moved/blobs/x")[0].headers.contains_key("authorization"));
}

#[tokio::test]
async fn redirects_in_circles_end() {
    let (server, (_dir, store)) = (Server::start().await, store());
    let sample = Sample::new(1, "amd64", &[100]);
    let reference = server.offer(&sample, "a:1");
    let path = format!("/v2/a/blobs/{}", Digest::of(&sample.layers[0]));
    server.content().forever = true;
    server.fail(&sample.layers[0], [Fault::RedirectHere(path)]);
    assert!(fails(&store, &reference).await.contains("redirects in circles"));
}

/// The connection breaks once, after every possible number of bytes; the rest is resumed, never repeated.
#[tokio::test]
async fn resumes_after_a_cut_anywhere() {
    let server = Server::start().await;
    let sample = Sample::new(1, "amd64", &[97]);
    let reference = server.offer(&sample, "a:1");
    let layer = &sample.layers[0];
    for cut in 0..=layer.len() {
        let (_dir, store) = store();
        server.content().seen.clear();
        server.fail(layer, [Fault::CutAfter(cut)]);
        pull(&store, &reference, &options()).await.unwrap();
        let requests = server.blob_requests(layer);
        let ranges: Vec<_> = requests.iter().map(|seen| seen.headers.get("range").cloned()).collect();
        match cut {
            0 => assert_eq!(ranges, [None, None]),
            97 => assert_eq!(ranges, [None]),
            _ => assert_eq!(ranges, [None, Some(format!("bytes={cut}-"))]),
        }
    }
}

/// More breaks than tries: progress between them counts.
#[tokio::test]
async fn resumes_after_many_cuts_of_a_large_layer() {
    let (server, (_dir, store)) = (Server::start().await, store());
    let sample = Sample::new(1, "amd64", &[500_000]);
    let reference = server.offer(&sample, "a:1");
    server.fail(&sample.layers[0], vec![Fault::CutAfter(40_001); 12]);
    pull(&store, &reference, &options()).await.unwrap();
    assert_eq!(server.blob_requests(&sample.layers[0]).len(), 13);
}

#[tokio::test]
async fn registries_without_ranges_send_it_all_again() {
    for fault in [Fault::NoRanges, Fault::WrongRange, Fault::Status(416)] {
        let (server, (_dir, store)) = (Server::start().await, store());
        let sample = Sample::new(1, "amd64", &[1000]);
        let reference = server.offer(&sample, "a:1");
        server.fail(&sample.layers[0], [Fault::CutAfter(500), fault]);
        pull(&store, &reference, &options()).await.unwrap();
    }
}

#[tokio::test]
async fn passing_trouble_is_borne() {
    let (server, (_dir, store)) = (Server::start().await, store());
    let sample = Sample::new(1, "amd64", &[1000]);
    let reference = server.offer(&sample, "a:1");
    server.fail(&sample.layers[0], [Fault::Status(503), Fault::Status(429)]);
    server.fail_at("manifests/1", [Fault::Status(500), Fault::CutAfter(3)]);
    pull(&store, &reference, &options()).await.unwrap();
}

/// An earlier process left a beginning: good ones are used, bad ones are noticed and replaced.
#[tokio::test]
async fn leftovers_of_earlier_pulls() {
    let server = Server::start().await;
    let sample = Sample::new(1, "amd64", &[1000]);
    let reference = server.offer(&sample, "a:1");
    let layer = &sample.layers[0];
    for (left, first) in [
        (layer[..600].to_vec(), Some("bytes=600-".to_owned())),
        (vec![0; 600], Some("bytes=600-".to_owned())),
        (vec![0; 1000], None),
        (vec![0; 2000], None),
        (layer.clone(), Some("none at all".to_owned())),
    ] {
        let (dir, store) = store();
        server.content().seen.clear();
        let path = dir.path().join("ingest").join(format!("{}.partial", Digest::of(layer).hex()));
        std::fs::write(path, &left).unwrap();
        pull(&store, &reference, &options()).await.unwrap();
        let requests = server.blob_requests(layer);
        match requests.first() {
            Some(request) => assert_eq!(request.headers.get("range").cloned(), first),
            None => assert_eq!(first.as_deref(), Some("none at all")),
        }
        assert_eq!((leftovers(dir.path()), blobs(dir.path())), (vec![], 3));
    }
}

#[tokio::test]
async fn a_full_disk_says_what_is_kept_and_the_next_pull_goes_on() {
    let (server, (dir, store)) = (Server::start().await, store());
    let sample = Sample::new(1, "amd64", &[1000, 300_000]);
    let reference = server.offer(&sample, "a:1");
    store.set_write_budget(220_000);
    let one = PullOptions { concurrency: 1, ..options() };
    let others = dir.path().join("ingest").join(format!("{}.partial", Digest::of(b"another layer").hex()));
    std::fs::write(&others, "its beginning").unwrap();
    let line = pull(&store, &reference, &one).await.unwrap_err().one_line();
    assert!(!others.exists(), "room is made at the cost of other downloads");
    assert!(line.starts_with("no space left on device: cannot write image 127.0.0.1:"), "{line}");
    let kept = store.partial_len(&Digest::of(&sample.layers[1]));
    assert!((100_000..=220_000).contains(&kept), "{kept}");
    let words = format!("1 of 2 layers and {} of the others are kept, free some space", human_bytes(kept));
    assert!(line.contains(&words), "{line}");
    assert!(store.images().unwrap().is_empty());
    store.set_write_budget(i64::MAX);
    server.content().seen.clear();
    pull(&store, &reference, &one).await.unwrap();
    assert!(server.blob_requests(&sample.layers[0]).is_empty());
    assert_eq!(server.blob_requests(&sample.layers[1])[0].headers["range"], format!("bytes={kept}-"));
    assert_eq!((leftovers(dir.path()), blobs(dir.path())), (vec![], 4));
}

#[tokio::test]
async fn two_pulls_at_once_download_once() {
    let (server, (dir, store)) = (Server::start().await, store());
    let sample = Sample::new(1, "amd64", &[100_000; 6]);
    let reference = server.offer(&sample, "a:1");
    let mut pulls = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let (store, reference) = (Store::open(dir.path()).unwrap(), reference.clone());
        // Also proves that the future can move between threads.
        pulls.spawn(async move { pull(&store, &reference, &options()).await.map(|pulled| pulled.image.id) });
    }
    while let Some(outcome) = pulls.join_next().await {
        assert_eq!(outcome.unwrap().unwrap(), sample.id());
    }
    for layer in &sample.layers {
        assert_eq!(server.blob_requests(layer).len(), 1);
    }
    assert_eq!((leftovers(dir.path()), blobs(dir.path()), store.images().unwrap().len()), (vec![], 8, 1));
}

#[tokio::test]
async fn a_stopped_pull_keeps_what_it_has() {
    let (server, (_dir, store)) = (Server::start().await, store());
    let sample = Sample::new(1, "amd64", &[1000]);
    let reference = server.offer(&sample, "a:1");
    server.fail(&sample.layers[0], [Fault::CutAfter(700), Fault::Silence]);
    {
        let options = options();
        let pulling = pull(&store, &reference, &options);
        tokio::pin!(pulling);
        // Stop it when the second request is under way.
        loop {
            tokio::select! {
                biased;
                _ = &mut pulling => panic!("it cannot end"),
                () = tokio::task::yield_now() => {
                    if server.blob_requests(&sample.layers[0]).len() == 2 { break; }
                }
            }
        }
    }
    server.content().seen.clear();
    pull(&store, &reference, &options()).await.unwrap();
    assert_eq!(server.blob_requests(&sample.layers[0])[0].headers["range"], "bytes=700-");
}

#[tokio::test]
async fn indexes_are_followed() {
    let (server, (_dir, store)) = (Server::start().await, store());
    let (amd, arm) = (Sample::new(1, "amd64", &[100]), Sample::new(5, "arm64", &[100]));
    server.offer_blobs(&amd);
    server.offer_blobs(&arm);
    let inner = index(&[
        ("unknown/unknown", &arm.config),
        ("linux/arm64", &arm.manifest),
        ("linux/amd64", &amd.manifest),
    ]);
    let reference = server.offer_manifest("a:1", INDEX, &inner);
    let pulled = pull(&store, &reference, &options()).await.unwrap();
    assert_eq!((pulled.image.id.clone(), pulled.digest), (amd.id(), Digest::of(&inner)));
    let pinned = reference.with_digest(Digest::of(&inner));
    assert_eq!(store.resolve(&pinned.to_string()).unwrap().id, amd.id());
    let arm64 = PullOptions { platform: Platform::parse("linux/arm64").unwrap(), ..options() };
    assert_eq!(pull(&store, &pinned, &arm64).await.unwrap().image.id, arm.id());
    let s390x = PullOptions { platform: Platform::parse("linux/s390x").unwrap(), ..options() };
    let line = pull(&store, &reference, &s390x).await.unwrap_err().one_line();
    assert!(line.ends_with("it has linux/arm64, linux/amd64"), "{line}");
}
