//! `hyper install containerd`: the shim where containerd looks for it, a runtime handler for Kubernetes in containerd's configuration, and
//! a configuration of our own that says what can be changed.
//!
//! The configuration gets one block between two marks, at its end, so that taking it out again leaves every other byte as it was. A file of
//! containerd 1.x (version 2) and one of containerd 2.x (version 3) name the CRI plugin differently; a drop-in of its own would replace what the
//! main file says of that plugin in 1.x.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::args::{InstallArgs, InstallWhat};
use crate::error::CliError;
use crate::output;

const SHIM: &str = "containerd-shim-hyper-v2";
const BEGIN: &str = "# hyper: begin (hyper install containerd --uninstall takes this out)\n";
const END: &str = "# hyper: end\n";
/// What the shim's own configuration is at first: everything in it is a comment.
const RUNTIME_CONFIG: &str = include_str!("../../../deploy/containerd.toml");
/// CRI plugin of containerd 1.x and 2.x.
const PLUGIN_V2: &str = "io.containerd.grpc.v1.cri";
const PLUGIN_V3: &str = "io.containerd.cri.v1.runtime";
/// Longest configuration that is read, bytes.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// Installs or takes away.
pub(crate) fn install(args: &InstallArgs) -> Result<i32, CliError> {
    let InstallWhat::Containerd = args.what;
    let link = args.bin_dir.join(SHIM);
    if args.uninstall {
        unlink(&link)?;
        if let Some(config) = read(&args.config)? {
            write(&args.config, &without_block(&config))?;
        }
        // One that was changed is the operator's.
        if read(&args.runtime_config)?.as_deref() == Some(RUNTIME_CONFIG) {
            fs::remove_file(&args.runtime_config)
                .map_err(|error| failed("remove", &args.runtime_config, &error))?;
        }
        output::line("containerd: the runtime is taken out; restart containerd when no pod uses it");
        return Ok(0);
    }
    let exe =
        std::env::current_exe().map_err(|error| CliError::failed(format!("find this program: {error}")))?;
    let shim = exe.with_file_name(SHIM);
    if !shim.is_file() {
        return Err(CliError::failed(format!(
            "{} is not there: install all of hyper's programs",
            shim.display()
        )));
    }
    if shim != link {
        unlink(&link)?;
        std::os::unix::fs::symlink(&shim, &link).map_err(|error| failed("link", &link, &error))?;
    }
    if read(&args.runtime_config)?.is_none() {
        write(&args.runtime_config, RUNTIME_CONFIG)?;
    }
    let config = read(&args.config)?.unwrap_or_else(|| "version = 2\n".to_owned());
    write(&args.config, &with_block(&config)?)?;
    output::line(format!(
        "containerd: {}, the handler hyper in {}, and what it can be told in {}",
        link.display(),
        args.config.display(),
        args.runtime_config.display()
    ));
    output::line("restart containerd for Kubernetes to see it; ctr and nerdctl need no restart");
    Ok(0)
}

fn failed(what: &str, path: &Path, error: &io::Error) -> CliError {
    CliError::failed(format!("cannot {what} {}: {error}", path.display()))
}

/// Removes our link; anything else of that name is somebody's.
fn unlink(link: &Path) -> Result<(), CliError> {
    match fs::symlink_metadata(link) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed("look at", link, &error)),
        Ok(data) if data.is_symlink() => {
            fs::remove_file(link).map_err(|error| failed("remove", link, &error))
        }
        // Installed there itself.
        Ok(_) => Ok(()),
    }
}

fn read(path: &Path) -> Result<Option<String>, CliError> {
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed("look at", path, &error)),
        Ok(data) if data.len() > MAX_CONFIG_BYTES => {
            return Err(CliError::failed(format!(
                "{} is larger than {MAX_CONFIG_BYTES} bytes",
                path.display()
            )));
        }
        Ok(_) => {}
    }
    fs::read_to_string(path).map(Some).map_err(|error| failed("read", path, &error))
}

/// Replaces the file whole, keeping its mode.
fn write(path: &Path, text: &str) -> Result<(), CliError> {
    let folder = path.parent().map_or_else(|| PathBuf::from("."), Path::to_path_buf);
    fs::create_dir_all(&folder).map_err(|error| failed("make", &folder, &error))?;
    let mut file =
        tempfile::NamedTempFile::new_in(&folder).map_err(|error| failed("write in", &folder, &error))?;
    io::Write::write_all(&mut file, text.as_bytes()).map_err(|error| failed("write", path, &error))?;
    let mode = fs::metadata(path)
        .map_or_else(|_| std::os::unix::fs::PermissionsExt::from_mode(0o644), |data| data.permissions());
    fs::set_permissions(file.path(), mode).map_err(|error| failed("set the mode of", path, &error))?;
    file.persist(path).map_err(|error| failed("replace", path, &error.error))?;
    Ok(())
}

/// The configuration's own version; without one it is of containerd's first.
fn version(config: &str) -> u32 {
    let line = config.lines().map(str::trim).find_map(|line| line.strip_prefix("version"));
    line.and_then(|rest| rest.trim_start().strip_prefix('=')?.trim().parse().ok()).unwrap_or(1)
}

fn without_block(config: &str) -> String {
    match config.split_once(BEGIN) {
        Some((before, rest)) => {
            let after = rest.split_once(END).map_or("", |(_, after)| after);
            format!("{before}{after}")
        }
        None => config.to_owned(),
    }
}

fn with_block(config: &str) -> Result<String, CliError> {
    let plain = without_block(config);
    let plugin = match version(&plain) {
        2 => PLUGIN_V2,
        3 => PLUGIN_V3,
        other => {
            return Err(CliError::failed(format!(
                "the configuration of containerd is of version {other}: 2 and 3 are known (containerd config migrate)"
            )));
        }
    };
    let table = format!("[plugins.\"{plugin}\".containerd.runtimes.hyper]");
    if plain.contains(&table) {
        return Err(CliError::failed(format!("the configuration of containerd has {table} already")));
    }
    // A handler that is named replaces those that containerd 1.x has by itself, and without its default one it has no pods at all.
    let others = format!("[plugins.\"{plugin}\".containerd.runtimes.");
    let default = if plugin == PLUGIN_V2 && !plain.contains(&others) {
        format!("{others}runc]\n  runtime_type = \"io.containerd.runc.v2\"\n")
    } else {
        String::new()
    };
    let newline = if plain.is_empty() || plain.ends_with('\n') { "" } else { "\n" };
    Ok(format!(
        "{plain}{newline}{BEGIN}{default}{table}\n  runtime_type = \"io.containerd.hyper.v2\"\n  pod_annotations = [\"io.hyper.*\"]\n{END}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_versions_get_their_plugins_name() {
        for (config, plugin) in [("version = 2\n", PLUGIN_V2), ("# x\nversion=3", PLUGIN_V3)] {
            let with = with_block(config).unwrap();
            assert!(with.contains(&format!("[plugins.\"{plugin}\".containerd.runtimes.hyper]\n")), "{with}");
            assert_eq!(with_block(&with).unwrap(), with, "once");
            assert_eq!(without_block(&with).trim_end(), config.trim_end());
        }
    }

    #[test]
    fn containerd_one_keeps_a_default_handler() {
        let runc = format!("[plugins.\"{PLUGIN_V2}\".containerd.runtimes.runc]");
        assert!(with_block("version = 2\n").unwrap().contains(&runc));
        let own = format!("version = 2\n{runc}\n");
        assert_eq!(with_block(&own).unwrap().matches(&runc).count(), 1);
        assert!(!with_block("version = 3\n").unwrap().contains("runc"));
    }

    #[test]
    fn own_configuration_is_written_once_and_kept_when_it_was_changed() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let exe = std::env::current_exe().unwrap();
        let args = |uninstall| InstallArgs {
            what: InstallWhat::Containerd,
            uninstall,
            config: at("config.toml"),
            runtime_config: at("hyper/containerd.toml"),
            bin_dir: at("bin"),
        };
        fs::create_dir(at("bin")).unwrap();
        // The shim is beside this program in a build.
        let shim = exe.with_file_name(SHIM);
        let made = !shim.exists() && fs::write(&shim, "").is_ok();
        install(&args(false)).unwrap();
        assert_eq!(read(&at("hyper/containerd.toml")).unwrap().as_deref(), Some(RUNTIME_CONFIG));
        install(&args(true)).unwrap();
        assert!(!at("hyper/containerd.toml").exists());
        install(&args(false)).unwrap();
        fs::write(at("hyper/containerd.toml"), "vcpus = 2\n").unwrap();
        install(&args(false)).unwrap();
        install(&args(true)).unwrap();
        assert_eq!(fs::read_to_string(at("hyper/containerd.toml")).unwrap(), "vcpus = 2\n");
        assert!(!at("bin").join(SHIM).exists());
        if made {
            fs::remove_file(shim).unwrap();
        }
    }

    #[test]
    fn what_is_not_understood_is_left_alone() {
        assert!(with_block("[plugins]\n").is_err(), "version 1");
        let own = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.hyper]\n";
        assert!(with_block(own).is_err());
        assert_eq!(without_block(own), own);
    }

    #[test]
    fn files_are_replaced_and_foreign_ones_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/config.toml");
        write(&path, "version = 2\n").unwrap();
        assert_eq!(read(&path).unwrap().as_deref(), Some("version = 2\n"));
        assert_eq!(read(&dir.path().join("none")).unwrap(), None);
        let foreign = dir.path().join(SHIM);
        fs::write(&foreign, "somebody's").unwrap();
        unlink(&foreign).unwrap();
        assert!(foreign.exists());
    }
}
