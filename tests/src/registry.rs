//! Debian's docker-registry on the loopback address, serving the fixtures; started on first use.
#![expect(clippy::panic, reason = "assertions of the cases; a panic is how a case fails")]

use std::fs;
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

use crate::{fixtures, wait_for};

/// The registry that anyone may read.
pub const REGISTRY: &str = "localhost:5000";
/// The registry that asks for [`USER`] and [`SECRET`].
pub const AUTH_REGISTRY: &str = "localhost:5001";
/// Who may read [`AUTH_REGISTRY`].
pub const USER: &str = "tester";
/// That user's password.
pub const SECRET: &str = "secret";

/// [`USER`] and [`SECRET`] as htpasswd writes them (bcrypt).
const HTPASSWD: &str = "tester:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n";

/// The full name of an image in the registry, which is started when it does not run yet.
#[must_use]
pub fn image(name: &str) -> String {
    registry();
    format!("{REGISTRY}/{name}")
}

/// Makes sure that the open registry answers.
pub fn registry() {
    static STARTED: OnceLock<Option<Child>> = OnceLock::new();
    STARTED.get_or_init(|| serve("open", REGISTRY, ""));
}

/// Makes sure that the registry with a password answers.
pub fn registry_with_password() {
    static STARTED: OnceLock<Option<Child>> = OnceLock::new();
    STARTED.get_or_init(|| {
        let path = "/run/registry.htpasswd";
        must(fs::write(path, HTPASSWD), "writing the registry's users");
        serve("auth", AUTH_REGISTRY, &format!("auth: {{htpasswd: {{realm: test, path: {path}}}}}\n"))
    });
}

fn serve(name: &str, address: &str, more: &str) -> Option<Child> {
    let address = address.replace("localhost", "127.0.0.1");
    // In the lab the first case leaves it to the others: the machine is thrown away with all that runs in it.
    let keep = std::env::var_os("HYPER_TEST_KEEP_REGISTRY").is_some();
    if keep && TcpStream::connect(&address).is_ok() {
        return None;
    }
    let config = format!(
        "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\n  \
         maintenance: {{readonly: {{enabled: true}}}}\nhttp: {{addr: {address}}}\n{more}",
        fixtures().join("registry").display()
    );
    let path = format!("/run/registry-{name}.yml");
    must(fs::write(&path, config), "writing the registry's configuration");
    let log = must(fs::File::create(format!("/run/registry-{name}.log")), "creating the registry's log");
    let child = Command::new("setpriv")
        .args(["--pdeathsig", if keep { "keep" } else { "KILL" }])
        .arg(fixtures().join("bin/docker-registry"))
        .args(["serve", &path])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn();
    let child = must(child, "starting the registry");
    wait_for("the registry to answer", || TcpStream::connect(&address).ok());
    Some(child)
}

fn must<T>(result: std::io::Result<T>, what: &str) -> T {
    match result {
        Ok(value) => value,
        Err(error) => panic!("{what}: {error}"),
    }
}
