//! Documents: specifications of containers, and what registries and archives of images say.

use std::path::Path;

/// `config.json` of a bundle, as containerd hands it over with what users wrote into it.
pub(crate) fn specification(data: &[u8]) {
    drop(hyper_sandbox::pod::check(data, Path::new("/bundle")));
}

/// Manifests, indexes, configurations, references, challenges, archives: the first byte chooses.
pub(crate) fn registry(data: &[u8]) {
    let Some((kind, rest)) = data.split_first() else { return };
    match kind % 5 {
        0 => hyper_image::fuzz::manifest(rest),
        1 => hyper_image::fuzz::config(rest),
        2 => hyper_image::fuzz::reference(&String::from_utf8_lossy(rest)),
        3 => hyper_image::fuzz::challenge(rest),
        _ => hyper_image::fuzz::archive(rest),
    }
}
