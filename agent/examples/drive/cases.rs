//! The cases: each is a few lines that say what a container sees.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use hyper_protocol::rpc::agent::{
    ArchiveRequest, Mount, NextEventsRequest, ResizeTerminalRequest, SignalProcessRequest, StatPathRequest,
    Stdio, TmpfsSource, UpdateContainerRequest, mount,
};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::guest::{Failure, Guest, Run, all_of, check, container, process, soon};

type Case = fn(Guest) -> Pin<Box<dyn Future<Output = Result<(), Failure>>>>;

macro_rules! cases {
    ($($name:ident),* $(,)?) => {
        /// All cases by name.
        pub(crate) const ALL: &[(&str, Case)] = &[$((stringify!($name), |guest| Box::pin($name(guest)))),*];
    };
}

cases![
    echo,
    exit_codes,
    stdin_comes_back,
    errors_of_start,
    identity,
    confinement,
    mounts,
    limits,
    terminal,
    init,
    exec,
    listing,
    pause,
    out_of_memory,
    archives,
    names,
    writable_layer,
    many,
];

/// Fails unless a script printed this.
async fn prints(guest: &Guest, run: Run, expected: &str) -> Result<(), Failure> {
    let out = guest.run(run).await?;
    check(out.stdout == expected, || format!("expected {expected:?}, got {out:?}"))
}

async fn echo(guest: Guest) -> Result<(), Failure> {
    let out = guest.run(Run::sh("echo out; echo err >&2")).await?;
    check(out.stdout == "out\n" && out.stderr == "err\n" && out.status.exit_code == 0, || format!("{out:?}"))
}

async fn exit_codes(guest: Guest) -> Result<(), Failure> {
    let out = guest.run(Run::sh("exit 42")).await?;
    check(out.status.exit_code == 42 && out.status.signal == 0, || format!("{out:?}"))?;
    // PID 1 cannot kill itself; its child can be killed.
    let out = guest.run(Run::sh("sh -c 'kill -9 $$'; exit $?")).await?;
    check(out.status.exit_code == 137, || format!("{out:?}"))
}

async fn stdin_comes_back(guest: Guest) -> Result<(), Failure> {
    let bytes: Vec<u8> = (0..4_000_000_u32).map(|n| b'a' + (n % 26) as u8).collect();
    let mut run = Run::new(&["cat"]);
    run.stdin = Some(bytes.clone());
    let out = guest.run(run).await?;
    check(out.stdout.as_bytes() == bytes, || {
        format!("{} of {} bytes came back", out.stdout.len(), bytes.len())
    })?;
    // A reader that stops early ends the writer's stream, not the container.
    let mut run = Run::sh("head -c 3; sleep 0.1; echo done");
    run.stdin = Some(bytes);
    prints(&guest, run, "abcdone\n").await
}

async fn errors_of_start(guest: Guest) -> Result<(), Failure> {
    for (command, code, text) in [
        ("nosuch", 127, "executable file not found in $PATH"),
        ("/nosuch", 127, "no such file or directory"),
        ("/etc", 126, "is a directory"),
        ("/etc/passwd", 126, "permission denied"),
        ("/bin/broken", 126, "exec format error"),
    ] {
        let out = guest.run(Run::new(&[command])).await?;
        let holds =
            out.started.exit_code == code && out.started.error == text && out.status.exit_code == code;
        check(holds, || format!("{command}: {out:?}"))?;
    }
    let error =
        guest.run(Run::sh("true").user("nosuch")).await.err().map(|e| e.to_string()).unwrap_or_default();
    check(error.contains("unable to find user nosuch: no matching entries in passwd file"), || {
        error.clone()
    })?;
    let caps = json!(["CAP_FLY"]);
    let run = Run::sh("true").set("/process/capabilities/bounding", caps);
    check(guest.run(run).await.is_err(), || "an unknown capability was taken".to_owned())
}

async fn identity(guest: Guest) -> Result<(), Failure> {
    prints(
        &guest,
        Run::sh("id -u; id -G; echo $HOME; pwd; umask; hostname"),
        "0\n0 10\n/root\n/\n0022\nbox\n",
    )
    .await?;
    prints(&guest, Run::sh("id -u; id -g; id -G; echo $HOME").user("app"), "100\n101\n101 10\n/home/app\n")
        .await?;
    prints(&guest, Run::sh("id -u; id -g; echo $HOME").user("1234:5678"), "1234\n5678\n/\n").await?;
    prints(&guest, Run::sh("pwd").set("/process/cwd", json!("/made/for/me")), "/made/for/me\n").await?;
    // Its own streams can be opened again by a user who is not root.
    prints(&guest, Run::sh("echo x >/dev/stdout").user("app"), "x\n").await?;
    prints(
        &guest,
        Run::sh("echo $$; readlink /proc/self/exe; ls /proc | grep -c '^[0-9]'"),
        "1\n/bin/busybox\n3\n",
    )
    .await
}

async fn confinement(guest: Guest) -> Result<(), Failure> {
    let caps = "grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status | tr '\\t' ' '";
    prints(
        &guest,
        Run::sh(caps),
        "CapInh: 0000000000000000\nCapPrm: 00000000a80425fb\nCapEff: 00000000a80425fb\nCapBnd: 00000000a80425fb\n\
         CapAmb: 0000000000000000\nNoNewPrivs: 0\nSeccomp: 2\n",
    )
    .await?;
    let run = Run::sh(caps).user("app").set("/process/noNewPrivileges", json!(true));
    prints(
        &guest,
        run,
        "CapInh: 0000000000000000\nCapPrm: 0000000000000000\nCapEff: 0000000000000000\nCapBnd: 00000000a80425fb\n\
         CapAmb: 0000000000000000\nNoNewPrivs: 1\nSeccomp: 2\n",
    )
    .await?;
    prints(&guest, Run::sh("unshare -m true 2>&1 | grep -o 'not permitted'"), "not permitted\n").await?;
    let run = Run::sh("grep Seccomp: /proc/self/status")
        .set("/annotations", json!({"hyper.seccomp": "unconfined"}));
    prints(&guest, run, "Seccomp:\t0\n").await?;
    // Masked: empty. Read-only: refused. The image disk: no access even through a node of one's own.
    prints(
        &guest,
        Run::sh("wc -c </proc/timer_list; (echo b >/proc/sysrq-trigger) 2>&1 | grep -o Read-only"),
        "0\nRead-only\n",
    )
    .await?;
    prints(
        &guest,
        Run::sh("mknod /tmp/d b 254 0 && (head -c 1 /tmp/d) 2>&1 | grep -o 'not permitted'; head -c 2 /dev/zero | wc -c"),
        "not permitted\n2\n",
    )
    .await?;
    prints(
        &guest,
        Run::sh("ulimit -n; ulimit -Hn; mount | grep -c ' / '; touch /x && echo writable"),
        "1024\n4096\n1\nwritable\n",
    )
    .await?;
    let run = Run::sh("touch /x 2>&1 | grep -o Read-only; touch /dev/shm/x && echo shm")
        .set("/root/readonly", json!(true));
    prints(&guest, run, "Read-only\nshm\n").await
}

async fn mounts(guest: Guest) -> Result<(), Failure> {
    let mut run = Run::sh(
        "stat -c %a /scratch; df -k /scratch | tail -1 | tr -s ' ' | cut -d' ' -f2; cat /seeded/file; touch /ro/x 2>&1 | grep -o Read-only; cat /etc/resolv.conf",
    );
    let tmpfs = |destination: &str, size_bytes, copy_up, read_only| Mount {
        destination: destination.to_owned(),
        copy_up,
        read_only,
        source: Some(mount::Source::Tmpfs(TmpfsSource { size_bytes, ..TmpfsSource::default() })),
        ..Mount::default()
    };
    run.mounts = vec![
        tmpfs("/scratch", 1 << 20, false, false),
        tmpfs("/seeded", 0, true, false),
        tmpfs("/ro", 0, false, true),
    ];
    let id = guest.id();
    let (stdout, out) = guest.stream().await?;
    let mut request = guest.request(&id, &run, Stdio { stdout, ..Stdio::default() })?;
    request.files = vec![hyper_protocol::rpc::agent::InjectedFile {
        path: "/etc/resolv.conf".to_owned(),
        content: b"nameserver 127.0.0.11\n".to_vec(),
        ..Default::default()
    }];
    guest.client.create_container(soon(), &request).await?;
    guest.client.start_process(soon(), &process(&id, "")).await?;
    guest.client.wait_process(soon(), &process(&id, "")).await?;
    let stdout = all_of(out).await?;
    guest.client.delete_container(soon(), &container(&id)).await?;
    check(stdout == "1777\n1024\nseed\nRead-only\nnameserver 127.0.0.11\n", || format!("{stdout:?}"))
}

async fn limits(guest: Guest) -> Result<(), Failure> {
    let run = Run::sh("cd /sys/fs/cgroup; cat cpu.max memory.max pids.max; (for i in 1 2 3 4 5 6; do sleep 1 & done) 2>&1 | grep -o -m1 'Resource'")
        .set("/linux/resources", json!({"cpu": {"quota": 150_000, "period": 100_000}, "memory": {"limit": 33_554_432}, "pids": {"limit": 5}}));
    prints(&guest, run, "150000 100000\n33554432\n5\nResource\n").await
}

/// Reads until the text has come.
async fn until(socket: &mut UnixStream, text: &str) -> Result<String, Failure> {
    let mut seen = String::new();
    while !seen.contains(text) {
        let mut buffer = [0; 1024];
        let n = timeout(Duration::from_secs(30), socket.read(&mut buffer))
            .await
            .map_err(|_| format!("no {text:?} in {seen:?}"))??;
        check(n > 0, || format!("ended without {text:?}: {seen:?}"))?;
        seen.push_str(&String::from_utf8_lossy(buffer.get(..n).unwrap_or_default()));
    }
    Ok(seen)
}

async fn terminal(guest: Guest) -> Result<(), Failure> {
    let id = guest.id();
    let (stdin, mut input) = guest.stream().await?;
    let (stdout, mut out) = guest.stream().await?;
    let stdio = Stdio { stdin, stdout, terminal: true, rows: 24, cols: 80, ..Stdio::default() };
    let request = guest.request(&id, &Run::new(&["sh"]), stdio)?;
    guest.client.create_container(soon(), &request).await?;
    guest.client.start_process(soon(), &process(&id, "")).await?;
    input.write_all(b"tty; stty size; ls /dev/console; echo en''d\n").await?;
    let seen = until(&mut out, "end\r\n").await?;
    check(seen.contains("/dev/pts/0\r\n") && seen.contains("24 80\r\n"), || format!("{seen:?}"))?;
    let size = ResizeTerminalRequest { container_id: id.clone(), rows: 40, cols: 100, ..Default::default() };
    guest.client.resize_terminal(soon(), &size).await?;
    input.write_all(b"stty size\n").await?;
    until(&mut out, "40 100\r\n").await?;
    input.write_all(b"sleep 100; echo code $?\n").await?;
    until(&mut out, "sleep 100; echo code $?\r\n").await?;
    input.write_all(b"\x03").await?;
    until(&mut out, "code 130\r\n").await?;
    input.write_all(b"exit 7\n").await?;
    let status = guest.client.wait_process(soon(), &process(&id, "")).await?;
    guest.client.delete_container(soon(), &container(&id)).await?;
    check(status.exit_code == 7, || format!("{status:?}"))
}

async fn init(guest: Guest) -> Result<(), Failure> {
    let mut run = Run::sh("echo $$; cat /proc/1/comm; exit 9");
    run.init = true;
    let out = guest.run(run).await?;
    check(out.stdout == "2\nhyper-init\n" && out.status.exit_code == 9, || format!("{out:?}"))?;
    let id = guest.id();
    let mut run = Run::sh("trap 'echo got; exit 3' TERM; echo ready; while :; do sleep 0.1; done");
    run.init = true;
    let (stdout, mut out) = guest.stream().await?;
    guest
        .client
        .create_container(soon(), &guest.request(&id, &run, Stdio { stdout, ..Stdio::default() })?)
        .await?;
    guest.client.start_process(soon(), &process(&id, "")).await?;
    until(&mut out, "ready\n").await?;
    signal(&guest, &id, 15, false).await?;
    until(&mut out, "got\n").await?;
    let status = guest.client.wait_process(soon(), &process(&id, "")).await?;
    guest.client.delete_container(soon(), &container(&id)).await?;
    check(status.exit_code == 3, || format!("{status:?}"))
}

async fn signal(guest: &Guest, id: &str, signal: u32, all: bool) -> Result<(), Failure> {
    let request = SignalProcessRequest { container_id: id.to_owned(), signal, all, ..Default::default() };
    guest.client.signal_process(soon(), &request).await?;
    Ok(())
}

/// A container that does nothing until it is killed.
async fn sleeper(guest: &Guest, run: Run) -> Result<String, Failure> {
    let id = guest.id();
    guest.client.create_container(soon(), &guest.request(&id, &run, Stdio::default())?).await?;
    guest.client.start_process(soon(), &process(&id, "")).await?;
    Ok(id)
}

async fn exec(guest: Guest) -> Result<(), Failure> {
    let id = sleeper(&guest, Run::new(&["sleep", "1000"])).await?;
    let out = guest.exec(&id, json!({"args": ["sh", "-c", "id -u; hostname; cat /proc/1/comm; grep Seccomp: /proc/self/status; exit 5"], "env": ["PATH=/bin"], "cwd": "/tmp"}), "app").await?;
    check(out.stdout == "100\nbox\nsleep\nSeccomp:\t2\n" && out.status.exit_code == 5, || {
        format!("{out:?}")
    })?;
    let out = guest.exec(&id, json!({"args": ["nosuch"], "env": ["PATH=/bin"]}), "").await?;
    check(out.started.exit_code == 127 && out.status.exit_code == 127, || format!("{out:?}"))?;
    // Something that it leaves behind does not hold its end back.
    let out = guest
        .exec(&id, json!({"args": ["sh", "-c", "sleep 1000 & echo left"], "env": ["PATH=/bin"]}), "")
        .await?;
    check(out.stdout == "left\n" && out.status.exit_code == 0, || format!("{out:?}"))?;
    let out = guest.exec(&id, json!({"args": ["sh", "-c", "kill -11 $$"], "env": ["PATH=/bin"]}), "").await?;
    check(out.status.exit_code == 139 && out.status.signal == 11, || format!("{out:?}"))?;
    signal(&guest, &id, 9, true).await?;
    let status = guest.client.wait_process(soon(), &process(&id, "")).await?;
    check(status.exit_code == 137 && status.signal == 9, || format!("{status:?}"))?;
    let refused =
        guest.exec(&id, json!({"args": ["true"]}), "").await.err().map(|e| e.to_string()).unwrap_or_default();
    check(refused.contains("is not running"), || refused.clone())?;
    guest.client.delete_container(soon(), &container(&id)).await?;
    guest.client.delete_container(soon(), &container(&id)).await?;
    Ok(())
}

async fn listing(guest: Guest) -> Result<(), Failure> {
    let id = sleeper(&guest, Run::sh("sleep 1000; true").user("app")).await?;
    let mut lines = Vec::new();
    for _ in 0..100 {
        let listed = guest.client.list_processes(soon(), &container(&id)).await?;
        lines = listed
            .processes
            .iter()
            .map(|p| format!("{} {} {} {}", p.pid, p.ppid, p.user, p.command))
            .collect();
        if lines.len() == 2 && lines.iter().any(|l| l.contains(" sleep ")) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    check(lines == ["1 0 app sh -c sleep 1000; true", "2 1 app sleep 1000"], || format!("{lines:?}"))?;
    let stats = guest.client.stats(soon(), &container(&id)).await?;
    check(stats.pids == 2 && stats.memory_usage_bytes > 0 && stats.cpu_usage_ns > 0, || {
        format!("{stats:?}")
    })?;
    guest.client.delete_container(soon(), &container(&id)).await?;
    Ok(())
}

async fn pause(guest: Guest) -> Result<(), Failure> {
    let id = sleeper(&guest, Run::new(&["sleep", "1000"])).await?;
    guest.client.pause_container(soon(), &container(&id)).await?;
    check(guest.exec(&id, json!({"args": ["true"]}), "").await.is_err(), || {
        "exec in a paused container".to_owned()
    })?;
    guest.client.resume_container(soon(), &container(&id)).await?;
    check(guest.client.resume_container(soon(), &container(&id)).await.is_err(), || {
        "resumed twice".to_owned()
    })?;
    let request = UpdateContainerRequest {
        container_id: id.clone(),
        oci_resources: br#"{"pids":{"limit":77}}"#.to_vec(),
        ..Default::default()
    };
    guest.client.update_container(soon(), &request).await?;
    let stats = guest.client.stats(soon(), &container(&id)).await?;
    check(stats.pids_limit == 77, || format!("{stats:?}"))?;
    guest.client.pause_container(soon(), &container(&id)).await?;
    guest.client.delete_container(soon(), &container(&id)).await?;
    Ok(())
}

async fn out_of_memory(guest: Guest) -> Result<(), Failure> {
    let run = Run::sh("x=a; while :; do x=$x$x; done")
        .set("/linux/resources", json!({"memory": {"limit": 8 << 20}}));
    let out = guest.run(run).await?;
    check(out.status.oom_killed && out.status.exit_code == 137, || format!("{out:?}"))?;
    let events = guest
        .client
        .next_events(soon(), &NextEventsRequest { timeout_ms: 1000, ..Default::default() })
        .await?;
    check(events.events.len() == 1, || format!("{events:?}"))
}

async fn archives(guest: Guest) -> Result<(), Failure> {
    let id = sleeper(&guest, Run::sh("mkdir /d; echo content >/d/f; ln -s f /d/l; exec sleep 1000")).await?;
    let request = |path: &str, stream| ArchiveRequest {
        container_id: id.clone(),
        path: path.to_owned(),
        stream,
        strict: true,
        ..Default::default()
    };
    let mut tar = Vec::new();
    for _ in 0..100 {
        let (stream, mut socket) = guest.stream().await?;
        let read = guest.client.read_archive(soon(), &request("/d", stream)).await;
        tar.clear();
        socket.read_to_end(&mut tar).await?;
        // The folder is filled while we look.
        if read.is_ok() && tar.windows(8).any(|w| w == b"content\n") && tar.windows(4).any(|w| w == b"d/l\0")
        {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let (stream, mut socket) = guest.stream().await?;
    let feed = tokio::spawn(async move {
        socket.write_all(&tar).await?;
        socket.shutdown().await?;
        socket.read(&mut [0]).await
    });
    let put = guest.client.write_archive(soon(), &request("/tmp", stream)).await?;
    feed.await??;
    check(put.bytes > 1024, || format!("{put:?}"))?;
    let out = guest.exec(&id, json!({"args": ["cat", "/tmp/d/l"], "env": ["PATH=/bin"]}), "").await?;
    check(out.stdout == "content\n", || format!("{out:?}"))?;
    let stat = |path: &str| StatPathRequest {
        container_id: id.clone(),
        path: path.to_owned(),
        ..Default::default()
    };
    let link = guest.client.stat_path(soon(), &stat("/tmp/d/l")).await?;
    check(link.name == "l" && link.link_target == "/tmp/d/f", || format!("{link:?}"))?;
    let missing = guest
        .client
        .stat_path(soon(), &stat("/nosuch"))
        .await
        .err()
        .map(|e| e.to_string())
        .unwrap_or_default();
    check(missing.contains("could not find the file /nosuch"), || missing.clone())?;
    // A container that has ended can still be copied from.
    signal(&guest, &id, 9, false).await?;
    guest.client.wait_process(soon(), &process(&id, "")).await?;
    let (stream, mut socket) = guest.stream().await?;
    guest.client.read_archive(soon(), &request("/d/f", stream)).await?;
    let mut tar = Vec::new();
    socket.read_to_end(&mut tar).await?;
    check(tar.windows(8).any(|w| w == b"content\n"), || "nothing from an ended container".to_owned())?;
    guest.client.delete_container(soon(), &container(&id)).await?;
    Ok(())
}

async fn names(guest: Guest) -> Result<(), Failure> {
    let run = Run::sh(
        "nslookup -type=a here.example 127.0.0.11 | grep -A1 Name: | tail -1; nslookup -type=a x.example 127.0.0.11 2>&1 | grep -o SERVFAIL",
    );
    prints(&guest, run, "Address: 192.0.2.7\nSERVFAIL\n").await
}

async fn writable_layer(guest: Guest) -> Result<(), Failure> {
    let write = |script: &str| {
        let mut run = Run::sh(script);
        run.writable = true;
        run
    };
    prints(&guest, write("echo kept >/kept; mv /seeded /renamed; rm /etc/group; sync; echo ok"), "ok\n")
        .await?;
    prints(
        &guest,
        write("cat /kept /renamed/file; ls /seeded /etc/group 2>&1 | grep -c 'No such'"),
        "kept\nseed\n2\n",
    )
    .await
}

async fn many(guest: Guest) -> Result<(), Failure> {
    let runs = (0..8).map(|n| {
        let guest = guest.clone();
        async move { guest.run(Run::sh(&format!("sleep 0.2; echo {n}"))).await.map(|o| o.stdout) }
    });
    let outputs = futures_util::future::join_all(runs).await;
    for (n, output) in outputs.into_iter().enumerate() {
        let output = output?;
        check(output == format!("{n}\n"), || format!("{n}: {output:?}"))?;
    }
    Ok(())
}
