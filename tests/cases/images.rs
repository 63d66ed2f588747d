//! Pulling, loading, listing, removing; layers with everything that a layer may hold.

use hyper_tests::{
    AUTH_REGISTRY, SECRET, Scratch, USER, fixtures, host, hyper, image, registry_with_password,
};

#[test]
fn pull_lists_and_removes() {
    let scratch = Scratch::new();
    let own = |words: &str| hyper(words).state(scratch.path());
    own("pull -q @busybox").ok().shows(&image("busybox"));
    own("images --format {{.Repository}}:{{.Tag}}").ok().says(&format!("{}:latest", image("busybox")));
    own("rmi @busybox").ok();
    own("images -q").ok().says("");
}

#[test]
fn index_gives_our_platform() {
    hyper("run --rm @multi ls /etc").ok().shows("passwd");
}

#[test]
fn digest_names_an_image() {
    hyper("pull -q @busybox").ok();
    let digest = hyper("inspect --format").args(&["{{index .RepoDigests 0}}", &image("busybox")]).ok().text();
    assert!(digest.contains("@sha256:"), "{digest}");
    hyper("run --rm").args(&[&digest, "echo", "by digest"]).ok().says("by digest");
}

#[test]
fn archive_of_docker_save_is_loaded() {
    let archive = fixtures().join("archives/busybox.tar");
    hyper("load -i").arg(&archive.to_string_lossy()).ok().shows("busybox:latest");
    hyper("run --rm --pull never busybox echo loaded").ok().says("loaded");
}

#[test]
fn archive_is_loaded_from_standard_input() {
    let archive = std::fs::read(fixtures().join("archives/busybox.tar")).unwrap();
    hyper("load").stdin(archive).ok().shows("busybox:latest");
}

#[test]
fn oci_layout_is_loaded() {
    let layout = fixtures().join("layouts/oddities");
    hyper("load -i").arg(&layout.to_string_lossy()).ok().shows("oddities");
    hyper("run --rm --pull never oddities cat /odd/original").ok().says("linked");
}

#[test]
fn layers_hold_links_owners_modes_and_holes() {
    let script = "cd /odd && stat -c '%a %u %g %h' original linked-below && stat -c '%a %F' setuid sticky fifo && \
                  stat -c '%F %t %T' character block && cat long-name* 'grün und blau' && echo && \
                  stat -c %s sparse && tail -c 3 sparse";
    let done = hyper("run --rm @oddities sh -c").arg(script).ok();
    let expected = "640 7 8 3\n640 7 8 3\n4755 regular file\n1777 directory\n600 fifo\n\
                    character special file 1 3\nblock special file 7 5\nlongname\n16777219\nend";
    done.says(expected);
}

#[test]
fn whiteouts_and_opaque_folders_hide_what_is_below() {
    let script = "cd /odd && ls opaque && cat file-then-folder/inside folder-then-file && readlink folder-then-link && \
                  ls -d gone gone-folder .wh* opaque/.wh* 2>/dev/null; stat -c %a opaque";
    hyper("run --rm @oddities sh -c").arg(script).ok().says("new\ninsidefileopaque\n750");
}

#[test]
fn extended_attributes_and_holes_arrive() {
    let script = "import os\n\
                  print(os.getxattr('/odd/attribute', 'user.colour').decode())\n\
                  print(os.getxattr('/odd/capable', 'security.capability').hex())\n\
                  sparse = open('/odd/sparse', 'rb').read()\n\
                  print(len(sparse), sparse.count(0), sparse[-3:])";
    hyper("run --rm @attributes python3 -c")
        .arg(script)
        .ok()
        .says("green\n0100000200200000000000000000000000000000\n16777219 16777216 b'end'");
}

#[test]
fn wrong_digest_is_refused_and_nothing_is_kept() {
    hyper("pull @damaged-digest").fails(1).complains(&["digest"]);
    hyper("run --rm @damaged-digest true").fails(125);
    assert!(!hyper("images").ok().text().contains("damaged-digest"));
}

#[test]
fn short_layer_is_refused_and_nothing_is_kept() {
    hyper("pull @damaged-short").fails(1).complains(&[]);
    assert!(!hyper("images").ok().text().contains("damaged-short"));
}

#[test]
fn unknown_image_and_unknown_registry_are_named() {
    hyper("pull @no-such-image").fails(1).complains(&["no-such-image"]);
    hyper("pull localhost:1/busybox").fails(1).complains(&["localhost:1"]);
    hyper("run --rm --pull never @never-pulled true").fails(125).complains(&["never-pulled"]);
}

#[test]
fn password_comes_from_dockers_configuration() {
    registry_with_password();
    let scratch = Scratch::new();
    let name = format!("{AUTH_REGISTRY}/busybox");
    let own = |words: &str| hyper(words).state(scratch.path()).env("DOCKER_CONFIG", scratch.path());
    own("pull -q").arg(&name).fails(1);
    let token = host(&format!("printf %s {USER}:{SECRET} | base64")).ok().text();
    scratch.file("config.json", format!("{{\"auths\": {{\"{AUTH_REGISTRY}\": {{\"auth\": \"{token}\"}}}}}}"));
    own("pull -q").arg(&name).ok().shows(&name);
}

#[test]
fn full_disk_during_pull_is_said_and_undone() {
    let scratch = Scratch::new();
    let small = scratch.join("small");
    host(&format!("mkdir {small} && mount -t tmpfs -o size=4m tmpfs {small}")).ok();
    let own = |words: &str| hyper(words).state(std::path::Path::new(&small));
    own("pull @debian").fails(1).complains(&["no space left"]);
    own("images -q").ok().says("");
    own("pull -q @user").ok();
    host(&format!("umount -l {small}")).ok();
}
