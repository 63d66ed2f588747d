//! From requests on the wire to plans: everything is checked here, once.

use hyper_protocol::MAX_INJECTED_FILE_BYTES;
use hyper_protocol::rpc::agent::{
    CreateContainerRequest, CreateProcessRequest, InjectedFile, Mount, ShareSource, SocketSource, Stdio,
    mount,
};

use crate::cgroup::{Cgroup, device};
use crate::container::Container;
use crate::disk::check_serial;
use crate::disk_root;
use crate::error::AgentError;
use crate::plan::{CreatePlan, File, ProcessPlan, Volume, VolumeSource, Window};
use crate::seccomp;
use crate::spec::{DeviceRule, ProcessSpec, Spec, absolute};

/// Most mounts from shares and memory.
const MAX_MOUNTS: usize = 128;
/// Most injected files.
const MAX_FILES: usize = 16;
/// Most bytes of all injected files: with the specification they fit a message of ttrpc, 4 MiB.
const MAX_FILES_BYTES: usize = 2 * MAX_INJECTED_FILE_BYTES;
/// Most additional groups.
const MAX_GROUPS: usize = 1024;
/// Longest user or group, bytes.
const MAX_USER_BYTES: usize = 256;
/// Longest tag of a virtio-fs share, bytes.
const MAX_TAG_BYTES: usize = 36;
/// Longest name of shared memory, bytes.
const MAX_SHARED_NAME_BYTES: usize = 32;

/// The wish for a terminal, with its size.
///
/// # Errors
/// Streams that do not go with it.
pub(crate) fn window(stdio: &Stdio) -> Result<Option<Window>, AgentError> {
    if !stdio.terminal {
        return Ok(None);
    }
    if stdio.stderr != 0 {
        return Err(AgentError::invalid("with a terminal there is no separate standard error"));
    }
    Ok(Some(sized(stdio.rows, stdio.cols)))
}

/// A size that the kernel can hold.
pub(crate) fn sized(rows: u32, cols: u32) -> Window {
    let fit = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
    Window { rows: fit(rows), cols: fit(cols) }
}

fn check_user(user: &str, groups: &[String]) -> Result<(), AgentError> {
    if groups.len() > MAX_GROUPS {
        return Err(AgentError::limit("additional groups", MAX_GROUPS));
    }
    if std::iter::once(user).chain(groups.iter().map(String::as_str)).any(|u| u.len() > MAX_USER_BYTES) {
        return Err(AgentError::limit("bytes of a user or group", MAX_USER_BYTES));
    }
    Ok(())
}

/// The device rules of a specification; Docker's and its own devices when it has none.
pub(crate) fn device_rules(spec: &Spec) -> Vec<DeviceRule> {
    match &spec.linux.resources.devices {
        // As runc does: what every container has stays allowed, a terminal of a later process among it.
        Some(rules) if !rules.is_empty() => rules.iter().cloned().chain(device::default_rules()).collect(),
        _ => {
            let own = spec.linux.devices.iter().map(|d| DeviceRule {
                allow: true,
                kind: d.kind.clone(),
                major: Some(d.major),
                minor: Some(d.minor),
                access: "rwm".to_owned(),
            });
            device::default_rules().into_iter().chain(own.filter(|r| r.kind != "p")).collect()
        }
    }
}

/// The plan for a container.
///
/// # Errors
/// Anything in the request that cannot be right.
pub(crate) fn create_plan(
    request: CreateContainerRequest,
    spec: Spec,
    cgroup: &Cgroup,
) -> Result<CreatePlan, AgentError> {
    check_user(&request.user, &request.additional_groups)?;
    let root_share = request.rootfs.share.clone().into_option().map(share).transpose()?;
    let root_disks = request.rootfs.disks.clone().into_option().map(disk_root::check).transpose()?;
    if root_share.is_none() && root_disks.is_none() {
        check_serial(&request.rootfs.image_disk)?;
    }
    if !request.rootfs.writable_disk.is_empty() {
        check_serial(&request.rootfs.writable_disk)?;
    }
    if request.mounts.len() > MAX_MOUNTS {
        return Err(AgentError::limit("mounts", MAX_MOUNTS));
    }
    let terminal = window(&request.stdio)?;
    let capabilities = spec.process.capabilities.clone().unwrap_or_default();
    let annotation = spec.annotations.get(seccomp::ANNOTATION).map(String::as_str);
    let seccomp = seccomp::choose(spec.linux.seccomp, annotation, &capabilities.bounding)?;
    Ok(CreatePlan {
        cgroup: cgroup.path().display().to_string(),
        hostname: spec.hostname,
        domainname: spec.domainname,
        pid_namespace: -1,
        ipc_namespace: -1,
        root_share,
        root_disks,
        image_disk: request.rootfs.image_disk.clone(),
        writable_disk: request.rootfs.writable_disk.clone(),
        root_read_only: spec.root.readonly,
        mounts: spec.mounts,
        volumes: request.mounts.into_iter().map(volume).collect::<Result<_, _>>()?,
        files: files(request.files)?,
        devices: spec.linux.devices,
        sysctl: spec.linux.sysctl.into_iter().collect(),
        masked_paths: spec.linux.masked_paths,
        readonly_paths: spec.linux.readonly_paths,
        init: request.init,
        traced: crate::trace::is_on(),
        process: ProcessPlan {
            no_new_privileges: spec.process.no_new_privileges.unwrap_or_default(),
            process: spec.process,
            user: request.user,
            additional_groups: request.additional_groups,
            capabilities,
            seccomp,
            terminal,
        },
    })
}

/// Tags and paths of all shares that a plan uses.
pub(crate) fn shares(plan: &CreatePlan) -> Vec<(String, String)> {
    let volumes = plan.volumes.iter().filter_map(|volume| match &volume.source {
        VolumeSource::Share { tag, path } => Some((tag.clone(), path.clone())),
        VolumeSource::Tmpfs { .. } | VolumeSource::Shared { .. } | VolumeSource::Socket { .. } => None,
    });
    plan.root_share.iter().cloned().chain(volumes).collect()
}

/// Names and sizes of all memory that a plan has in common with other containers.
pub(crate) fn shared_memory(plan: &CreatePlan) -> Vec<(String, u64)> {
    let shared = plan.volumes.iter().filter_map(|volume| match &volume.source {
        VolumeSource::Shared { name, size_bytes } => Some((name.clone(), *size_bytes)),
        VolumeSource::Share { .. } | VolumeSource::Tmpfs { .. } | VolumeSource::Socket { .. } => None,
    });
    shared.collect()
}

/// Whether it can be the name of a folder.
fn is_plain(name: &str, most_bytes: usize) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
    !name.is_empty() && name.len() <= most_bytes && name.bytes().all(plain)
}

/// Tag and path, checked.
fn share(share: ShareSource) -> Result<(String, String), AgentError> {
    if !is_plain(&share.tag, MAX_TAG_BYTES) {
        return Err(AgentError::invalid(format!("share tag {:?}", share.tag)));
    }
    absolute("path of a share", &format!("/{}", share.path))?;
    Ok((share.tag, share.path))
}

fn volume(mount: Mount) -> Result<Volume, AgentError> {
    absolute("mount destination", &mount.destination)?;
    let source = match mount.source {
        Some(mount::Source::Share(from)) => {
            let (tag, path) = share(from)?;
            VolumeSource::Share { tag, path }
        }
        Some(mount::Source::Tmpfs(tmpfs)) => {
            VolumeSource::Tmpfs { size_bytes: tmpfs.size_bytes, mode: tmpfs.mode, noexec: tmpfs.noexec }
        }
        Some(mount::Source::SharedMemory(memory)) => {
            if !is_plain(&memory.name, MAX_SHARED_NAME_BYTES) {
                return Err(AgentError::invalid(format!("name {:?} of shared memory", memory.name)));
            }
            VolumeSource::Shared { name: memory.name, size_bytes: memory.size_bytes }
        }
        Some(mount::Source::Socket(SocketSource { id, mode, uid, gid, .. })) => {
            VolumeSource::Socket { id, mode, uid, gid }
        }
        Some(_) | None => {
            return Err(AgentError::invalid(format!("mount at {} has no source", mount.destination)));
        }
    };
    Ok(Volume { destination: mount.destination, source, read_only: mount.read_only, copy_up: mount.copy_up })
}

/// Checks files that are put into a container.
///
/// # Errors
/// Too many, too long, or not at an absolute path.
pub(crate) fn files(files: Vec<InjectedFile>) -> Result<Vec<File>, AgentError> {
    if files.len() > MAX_FILES {
        return Err(AgentError::limit("injected files", MAX_FILES));
    }
    if files.iter().map(|f| f.content.len()).sum::<usize>() > MAX_FILES_BYTES {
        return Err(AgentError::limit("bytes of injected files", MAX_FILES_BYTES));
    }
    let check = |file: InjectedFile| {
        absolute("injected file", &file.path)?;
        if file.content.len() > MAX_INJECTED_FILE_BYTES {
            return Err(AgentError::limit(
                &format!("bytes of injected file {}", file.path),
                MAX_INJECTED_FILE_BYTES,
            ));
        }
        Ok(File { path: file.path, content: file.content, mode: file.mode })
    };
    files.into_iter().map(check).collect()
}

/// The plan for a process that is added: what its request leaves out it has from its container.
///
/// # Errors
/// Anything in the request that cannot be right.
pub(crate) fn process_plan(
    request: CreateProcessRequest,
    container: &Container,
) -> Result<ProcessPlan, AgentError> {
    check_user(&request.user, &request.additional_groups)?;
    let terminal = window(&request.stdio)?;
    let mut process = ProcessSpec::parse(&request.oci_process)?;
    let template = container.template();
    process.rlimits.get_or_insert_with(|| template.rlimits.clone());
    process.oom_score_adj = process.oom_score_adj.or(template.oom_score_adj);
    let capabilities = process.capabilities.clone().unwrap_or_else(|| template.capabilities.clone());
    Ok(ProcessPlan {
        no_new_privileges: process.no_new_privileges.unwrap_or(template.no_new_privileges),
        process,
        user: request.user,
        additional_groups: request.additional_groups,
        capabilities,
        seccomp: template.seccomp.clone(),
        terminal,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper_protocol::rpc::agent::{SharedMemorySource, TmpfsSource};

    #[test]
    fn a_terminal_has_one_output() {
        let stdio = Stdio { terminal: true, rows: 24, cols: 100_000, ..Stdio::default() };
        assert_eq!(window(&stdio).unwrap(), Some(Window { rows: 24, cols: u16::MAX }));
        assert!(window(&Stdio { stderr: 3, ..stdio }).is_err());
        assert_eq!(window(&Stdio { stderr: 3, ..Stdio::default() }).unwrap(), None);
    }

    #[test]
    fn mounts_are_checked() {
        let share = |tag: &str, path: &str| Mount {
            destination: "/data".to_owned(),
            source: Some(mount::Source::Share(ShareSource {
                tag: tag.to_owned(),
                path: path.to_owned(),
                ..ShareSource::default()
            })),
            ..Mount::default()
        };
        assert!(volume(share("hyper", "0")).is_ok());
        assert!(volume(share("", "0")).is_err());
        assert!(volume(share("../x", "0")).is_err());
        assert!(volume(share("hyper", "a\0")).is_err());
        assert!(volume(Mount { destination: "/x".to_owned(), ..Mount::default() }).is_err());
        let shared = |name: &str| Mount {
            destination: "/dev/shm".to_owned(),
            source: Some(mount::Source::SharedMemory(SharedMemorySource {
                name: name.to_owned(),
                ..SharedMemorySource::default()
            })),
            ..Mount::default()
        };
        assert!(volume(shared("shm-0")).is_ok());
        for wrong in ["", "..", "a/b", &"x".repeat(33)] {
            assert!(volume(shared(wrong)).is_err(), "{wrong:?}");
        }
        let tmpfs = Some(mount::Source::Tmpfs(TmpfsSource::default()));
        assert!(volume(Mount { destination: "x".to_owned(), source: tmpfs, ..Mount::default() }).is_err());
    }

    #[test]
    fn injected_files_are_bounded() {
        let file = |path: &str, len| InjectedFile {
            path: path.to_owned(),
            content: vec![0; len],
            ..InjectedFile::default()
        };
        assert!(files(vec![file("/etc/hosts", 10)]).is_ok());
        assert!(files(vec![file("etc/hosts", 10)]).is_err());
        assert!(files(vec![file("/a", MAX_INJECTED_FILE_BYTES + 1)]).is_err());
        assert!(files(vec![file("/a", MAX_INJECTED_FILE_BYTES); 5]).is_err());
        assert!(files(vec![file("/a", 0); MAX_FILES + 1]).is_err());
    }

    #[test]
    fn devices_default_to_dockers() {
        let spec = Spec::parse(br#"{"process":{"args":["a"]},"linux":{"devices":[{"path":"/dev/fuse","type":"c","major":10,"minor":229}]}}"#)
            .unwrap();
        let rules = device_rules(&spec);
        assert_eq!(rules.last().unwrap().minor, Some(229));
        assert!(rules.len() > 10);
        let own =
            Spec::parse(br#"{"process":{"args":["a"]},"linux":{"resources":{"devices":[{"allow":true}]}}}"#)
                .unwrap();
        let rules = device_rules(&own);
        assert!(rules.first().unwrap().major.is_none() && rules.iter().any(|rule| rule.major == Some(136)));
    }
}
