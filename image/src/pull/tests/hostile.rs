//! Registries that lie, and images that cannot run: one clear line each, and nothing stored.

use super::*;

#[tokio::test]
async fn unknown_images() {
    let (server, (_dir, store)) = (Server::start().await, store());
    let reference = Reference::parse(&format!("{}/nope:1", server.address)).unwrap();
    assert_eq!(
        fails(&store, &reference).await,
        format!("manifest for {reference} not found: manifest unknown")
    );
    drop(server);
    let sample = Sample::new(1, "amd64", &[100]);
    let server = Server::start().await;
    let reference = server.offer(&sample, "a:1");
    server.content().blobs.remove(&Digest::of(&sample.layers[0]).to_string());
    assert!(fails(&store, &reference).await.contains("blob unknown"));
}

#[tokio::test]
async fn nobody_listens() {
    let (_dir, store) = store();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let reference = Reference::parse(&format!("{address}/a")).unwrap();
    let line = fails(&store, &reference).await;
    assert!(
        line.starts_with(&format!("cannot read manifest of {address}/a:latest from registry {address}")),
        "{line}"
    );
    assert!(line.contains("refused"), "{line}");
}

#[tokio::test]
async fn wrong_content_is_never_stored() {
    let (server, (dir, store)) = (Server::start().await, store());
    let sample = Sample::new(1, "amd64", &[1000, 10]);
    let reference = server.offer(&sample, "a:1");
    let layer = &sample.layers[0];
    server.content().forever = true;
    for (fault, says) in [
        (Fault::Instead(noise(9, 1000)), "wrong digest: blob of 1000 bytes should be sha256:"),
        (Fault::Instead(noise(9, 1001)), "is declared as 1000 bytes but has 1001"),
        (Fault::Unannounced(noise(9, 500_000)), "is declared as 1000 bytes but has "),
        (Fault::CutAfter(400), "is truncated: the registry 127.0.0.1:"),
        (Fault::Instead(layer[..400].to_vec()), "sent 400 of 1000 bytes, 3 tries"),
        (Fault::Unannounced(layer[..400].to_vec()), "sent 400 of 1000 bytes, 3 tries"),
        (Fault::Status(503), "answers 503 to layer "),
        (Fault::Status(403), "pull access denied"),
        (Fault::Status(404), "blob unknown"),
        (Fault::Redirect("ftp://x/y".into()), "redirects to an address without encryption"),
        (Fault::Redirect("http://[".into()), "redirects to a malformed address"),
    ] {
        // The cut resumes, so only a cut at the same place again and again is a truncation.
        let faults = match fault {
            Fault::CutAfter(_) => vec![fault, Fault::CutAfter(0)],
            _ => vec![fault],
        };
        server.fail(layer, faults);
        let line = fails(&store, &reference).await;
        assert!(line.contains(says), "{line}");
        assert!(!store.blob_path(&Digest::of(layer)).exists());
        let kept = leftovers(dir.path()).contains(&format!("{}.partial", Digest::of(layer).hex()));
        assert_eq!(kept, says.contains("truncated") || says.contains("sent 400"), "{line}");
        blobs(dir.path());
        for name in leftovers(dir.path()) {
            std::fs::remove_file(dir.path().join("ingest").join(name)).unwrap();
        }
    }
}

#[tokio::test]
async fn silence_ends() {
    let (server, (_dir, store)) = (Server::start().await, store());
    let sample = Sample::new(1, "amd64", &[1000]);
    let reference = server.offer(&sample, "a:1");
    server.content().forever = true;
    server.fail(&sample.layers[0], [Fault::Silence]);
    let mut options = options();
    options.patience.stall_ms = 50;
    let line = pull(&store, &reference, &options).await.unwrap_err().one_line();
    assert!(line.contains("sent nothing of layer"), "{line}");
}

#[tokio::test]
async fn manifests_that_lie() {
    let (server, (_dir, store)) = (Server::start().await, store());
    let sample = Sample::new(1, "amd64", &[100]);
    server.offer_blobs(&sample);
    let huge = noise(1, 5 << 20);
    let wrong_size = String::from_utf8(index(&[("linux/amd64", &sample.manifest)])).unwrap();
    let declared = format!("\"size\":{}", sample.manifest.len());
    let wrong_size = wrong_size.replace(&declared, &format!("\"size\":{}", sample.manifest.len() + 1));
    let gzip = "application/vnd.docker.image.rootfs.diff.tar.gzip";
    let foreign =
        manifest(&sample.config, &sample.layers, "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip");
    let mut loop_index = index(&[("linux/amd64", b"")]);
    for _ in 0..5 {
        server.offer_manifest("loop:0", INDEX, &loop_index);
        loop_index = index(&[("linux/amd64", &loop_index)]);
    }
    let two_layers = manifest(&sample.config, &[sample.layers[0].clone(), sample.layers[0].clone()], gzip);
    let no_config = manifest(b"gone", &sample.layers, gzip);
    for (kind, bytes, says) in [
        (MANIFEST, huge.as_slice(), "is too large: 5242880 exceeds the limit of 4194304"),
        (MANIFEST, b"{}", "is malformed: it is neither a manifest nor an index"),
        (MANIFEST, b"<html>", "is malformed: expected value"),
        (MANIFEST, br#"{"schemaVersion":1,"fsLayers":[]}"#, "is not supported: it has the retired schema 1"),
        (INDEX, wrong_size.as_bytes(), "wrong size: manifest sha256:"),
        (INDEX, &loop_index, "nests indexes deeper than 3"),
        (MANIFEST, &foreign, "foreign layer"),
        (MANIFEST, &two_layers, "it lists 1 layers but the manifest 2"),
        (MANIFEST, &no_config, "blob unknown"),
    ] {
        let reference = server.offer_manifest("a:1", kind, bytes);
        let line = fails(&store, &reference).await;
        assert!(line.contains(says), "{line}");
    }
}

#[tokio::test]
async fn manifests_of_unannounced_length_are_bounded() {
    let (server, (_dir, store)) = (Server::start().await, store());
    let reference = server.offer(&Sample::new(1, "amd64", &[100]), "a:1");
    server.fail_at("manifests/1", [Fault::Unannounced(noise(1, 6 << 20))]);
    assert!(fails(&store, &reference).await.contains("is too large"));
}

#[tokio::test]
async fn a_digest_is_not_answered_by_another_manifest() {
    let (server, (_dir, store)) = (Server::start().await, store());
    let sample = Sample::new(1, "amd64", &[100]);
    let reference = server.offer(&sample, "a:1").with_digest(Digest::of(b"x"));
    let key = reference.digest().unwrap().to_string();
    server.content().manifests.insert(key, (MANIFEST.into(), sample.manifest.clone()));
    assert!(fails(&store, &reference).await.starts_with("wrong digest: manifest of "));
}

#[tokio::test]
async fn images_of_other_platforms() {
    let (server, (_dir, store)) = (Server::start().await, store());
    let sample = Sample::new(1, "arm64", &[100]);
    let reference = server.offer(&sample, "a:1");
    let line = fails(&store, &reference).await;
    assert_eq!(line, format!("no image for platform linux/amd64 in {reference}: it has linux/arm64"));
    assert!(server.blob_requests(&sample.layers[0]).is_empty());
}

/// A configuration blob that exists with other content than the manifest says is refused by digest, and a declared
/// size that is wrong is noticed even when the blob is stored already.
#[tokio::test]
async fn declared_sizes_are_compared_with_stored_blobs() {
    let (server, (_dir, store)) = (Server::start().await, store());
    let sample = Sample::new(1, "amd64", &[100]);
    store.put_blob(&sample.layers[0]).unwrap();
    let text = String::from_utf8(sample.manifest.clone()).unwrap().replace("\"size\":100", "\"size\":99");
    server.offer_blobs(&sample);
    let reference = server.offer_manifest("a:1", MANIFEST, text.as_bytes());
    assert!(fails(&store, &reference).await.contains("is declared as 99 bytes but has 100"));
    assert!(descriptor("x", b"").contains("\"size\":0"));
}
