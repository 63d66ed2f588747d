//! `pull`, `images`, `rmi`, `load`.

use std::collections::BTreeMap;

use hyper_image::{Image, Reference, Removed};
use hyper_sandbox::Timestamp;
use serde_json::{Value, json};

use super::provide;
use crate::args::{ImagesArgs, LoadArgs, PullArgs, RmiArgs, TagArgs};
use crate::context;
use crate::error::CliError;
use crate::format::{Column, Format};
use crate::options::{quantity, time};
use crate::output;

const COLUMNS: [Column; 5] = [
    Column { heading: "REPOSITORY", key: "Repository" },
    Column { heading: "TAG", key: "Tag" },
    Column { heading: "IMAGE ID", key: "ID" },
    Column { heading: "CREATED", key: "CreatedSince" },
    Column { heading: "SIZE", key: "Size" },
];
const DIGEST: Column = Column { heading: "DIGEST", key: "Digest" };

/// `hyper pull`.
///
/// # Errors
/// What the registry or the store have against it.
pub(crate) async fn pull(args: PullArgs) -> Result<i32, CliError> {
    let store = context::images()?;
    let reference = Reference::parse(&args.image)?;
    if !args.quiet && args.image.rfind(':') <= args.image.rfind('/') && reference.digest().is_none() {
        output::line("Using default tag: latest");
    }
    let options = provide::options(args.platform.as_deref(), &args.verify_key, args.quiet)?;
    let pulled = provide::pull(&store, &reference, &options).await?;
    if !args.quiet {
        output::line(format!("Digest: {}", pulled.digest));
        let news = if pulled.changed { "Downloaded newer image for" } else { "Image is up to date for" };
        output::line(format!("Status: {news} {reference}"));
    }
    output::line(reference.full());
    Ok(0)
}

/// `hyper images`.
///
/// # Errors
/// A bad template, or a store that cannot be read.
pub(crate) fn images(args: &ImagesArgs) -> Result<i32, CliError> {
    let images = context::images()?.images()?;
    let now = Timestamp::now();
    let rows: Vec<Value> = images.iter().flat_map(|image| rows(image, args, now)).collect();
    if args.quiet && args.format.is_none() {
        let mut shown = std::collections::BTreeSet::new();
        for id in rows.iter().filter_map(|row| row.get("ID").and_then(Value::as_str)) {
            if shown.insert(id) {
                output::line(id);
            }
        }
        return Ok(0);
    }
    let mut columns = COLUMNS.to_vec();
    if args.digests {
        columns.insert(2, DIGEST);
    }
    Format::parse(args.format.as_deref())?.print(&columns, &rows)?;
    Ok(0)
}

fn rows(image: &Image, args: &ImagesArgs, now: Timestamp) -> Vec<Value> {
    let created = Timestamp::from_unix_ns(image.created_unix_s.unwrap_or(0).saturating_mul(1_000_000_000));
    let id = if args.no_trunc { image.id.to_string() } else { image.id.short().to_owned() };
    let row = |repository: String, tag: &str, digest: String| {
        json!({
            "Repository": repository,
            "Tag": tag,
            "Digest": digest,
            "ID": id,
            "CreatedAt": created.to_string(),
            "CreatedSince": format!("{} ago", time::human(time::since(created, now))),
            "Size": quantity::human(image.size_bytes),
        })
    };
    let digest = image
        .repo_digests
        .iter()
        .find_map(|r| r.digest())
        .map_or_else(|| "<none>".to_owned(), ToString::to_string);
    if image.references.is_empty() {
        let wanted = args.repository.is_none();
        return if wanted { vec![row("<none>".to_owned(), "<none>", digest)] } else { Vec::new() };
    }
    let wanted = |r: &&Reference| match args.repository.as_deref().map(Reference::parse) {
        None => true,
        Some(Ok(want)) => {
            let tagged = args.repository.as_deref().is_some_and(|t| t.rfind(':') > t.rfind('/'));
            want.repository() == r.repository() && (!tagged || want.tag() == r.tag())
        }
        Some(Err(_)) => false,
    };
    let shown = image.references.iter().filter(wanted);
    shown.map(|r| row(r.familiar_name(), r.tag().unwrap_or("<none>"), digest.clone())).collect()
}

/// `hyper tag`.
///
/// # Errors
/// No such image, or a name that is none.
pub(crate) fn tag(args: &TagArgs) -> Result<i32, CliError> {
    let store = context::images()?;
    let tagged = Reference::parse(&args.target).and_then(|target| store.tag(&args.source, &target));
    context::audit().note("image tag", &args.source, &args.target, tagged)?;
    Ok(0)
}

/// `hyper rmi`.
///
/// # Errors
/// Exit code 1 when one of them could not be removed.
pub(crate) fn rmi(args: &RmiArgs) -> Result<i32, CliError> {
    let (home, store) = (context::home()?, context::images()?);
    let mut code = 0;
    for name in &args.images {
        let removed = store.remove(name, args.force, &context::used_images(&home)?);
        match home.audit().note("image remove", name, "", removed) {
            Ok(removal) => {
                for step in removal.removed {
                    match step {
                        Removed::Untagged(name) => output::line(format!("Untagged: {name}")),
                        Removed::Deleted(id) => output::line(format!("Deleted: {id}")),
                    }
                }
            }
            Err(error) => {
                output::error(CliError::from(error));
                code = 1;
            }
        }
    }
    Ok(code)
}

/// `hyper load`.
///
/// # Errors
/// When the archive is not one, or is damaged; nothing of it is kept then.
pub(crate) async fn load(args: LoadArgs) -> Result<i32, CliError> {
    let store = context::images()?;
    let options = hyper_image::LoadOptions::default();
    let audit = context::audit();
    let loaded = match &args.input {
        Some(path) => {
            let loaded = hyper_image::load_path(&store, path, &options).await;
            audit.note("image load", &path.display().to_string(), "", loaded)?
        }
        None if std::io::IsTerminal::is_terminal(&std::io::stdin()) => {
            return Err(CliError::failed(
                "requested load from stdin, but stdin is a terminal: give -i FILE or a pipe",
            ));
        }
        None => {
            let loaded = hyper_image::load(&store, std::io::stdin(), &options).await;
            audit.note("image load", "standard input", "", loaded)?
        }
    };
    let mut names: BTreeMap<String, ()> = BTreeMap::new();
    for image in loaded {
        if image.references.is_empty() {
            names.insert(format!("Loaded image ID: {}", image.image.id), ());
        }
        for reference in &image.references {
            names.insert(format!("Loaded image: {reference}"), ());
        }
    }
    names.keys().for_each(output::line);
    Ok(0)
}
