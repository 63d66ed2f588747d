//! The installer's image, built as `deploy/image/Dockerfile` says: by its `COPY` and `CMD` lines, on Debian from the fixtures.
#![expect(clippy::panic, reason = "assertions of the cases; a panic is how a case fails")]

use serde_json::{Value, json};

use crate::program::host;
use crate::{Scratch, fixtures, given};

/// An archive of the fixtures that begins with Debian's layer.
const BASE: &str = "archives/iperf3.tar";
/// The folder of the Dockerfile, which is also the context that it calls `install`.
const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/image");

/// What is copied: from where, to where in the image, and with which mode if the line says so.
fn copied(line: &str) -> (String, &str, Option<&str>) {
    let (flags, paths): (Vec<_>, Vec<_>) = line.split_whitespace().partition(|word| word.starts_with("--"));
    let flag = |name: &str| flags.iter().find_map(|flag| flag.strip_prefix(name));
    let context = match flag("--from=") {
        None => given("HYPER_TEST_PREFIX").display().to_string(),
        Some("install") => FOLDER.to_owned(),
        Some(other) => panic!("the Dockerfile copies from {other}, which is not known here"),
    };
    match paths.as_slice() {
        [from, to] => (format!("{context}/{from}"), to, flag("--chmod=")),
        _ => panic!("{line:?} is not understood"),
    }
}

/// Builds the image, as an archive of `docker save`; its path.
///
/// # Panics
/// When the Dockerfile has what is not understood here.
#[must_use]
pub fn installer_archive(scratch: &Scratch, name: &str) -> String {
    let (image, tree) = (scratch.join("image"), scratch.join("tree"));
    host(&format!("mkdir {image} {tree} && tar -xf {}/{BASE} -C {image}", fixtures().display())).ok();
    let mut command = Value::Null;
    for line in read(&format!("{FOLDER}/Dockerfile")).lines() {
        match line.split_once(' ') {
            Some(("COPY", rest)) => {
                let (from, to, mode) = copied(rest);
                let mode = mode.map_or_else(String::new, |mode| format!("&& chmod {mode} {tree}{to}"));
                host(&format!("mkdir -p $(dirname {tree}{to}) && cp -a {from} {tree}{to} {mode}")).ok();
            }
            Some(("CMD", rest)) => command = parse(rest),
            None | Some(("FROM" | "#", _)) => {}
            Some((other, _)) => panic!("{other} in the Dockerfile is not known here"),
        }
    }
    host(&format!("tar --owner=0 --group=0 -cf {image}/own.tar -C {tree} .")).ok();
    let digest = host(&format!("sha256sum {image}/own.tar | cut -d ' ' -f 1")).ok().text();

    let mut manifest = parse(&read(&format!("{image}/manifest.json")));
    let config_name = manifest.pointer("/0/Config").and_then(Value::as_str).unwrap_or_default().to_owned();
    let mut config = parse(&read(&format!("{image}/{config_name}")));
    // Of the base's layers the first is Debian's.
    let first = |value: &mut Value, pointer: &str, own: Value| {
        if let Some(all) = value.pointer_mut(pointer).and_then(Value::as_array_mut) {
            all.truncate(1);
            all.push(own);
        }
    };
    first(&mut config, "/rootfs/diff_ids", json!(format!("sha256:{digest}")));
    first(&mut manifest, "/0/Layers", json!("own.tar"));
    set(&mut config, "/config", "Cmd", command);
    set(&mut manifest, "/0", "RepoTags", json!([name]));
    set(&mut manifest, "/0", "Config", json!("config.json"));
    scratch.file("image/config.json", config.to_string());
    scratch.file("image/manifest.json", manifest.to_string());
    let archive = scratch.join("installer.tar");
    host(&format!("tar -cf {archive} -C {image} . --transform 's,^[.]/,,' && rm -r {image} {tree}")).ok();
    archive
}

fn set(value: &mut Value, pointer: &str, key: &str, own: Value) {
    if let Some(object) = value.pointer_mut(pointer).and_then(Value::as_object_mut) {
        object.insert(key.to_owned(), own);
    }
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("reading {path}: {error}"))
}

fn parse(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{text:?}: {error}"))
}
