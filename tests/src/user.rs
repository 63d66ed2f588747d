//! A user of the host who is not root: may open /dev/kvm, and nothing else is special about that user.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::program::{Run, host};
use crate::{given, scratch_base};

/// Ids of users of the cases: of nobody else, and without a line in /etc/passwd, which nothing of ours needs.
const FIRST_ID: u32 = 47_110;

/// As whom `hyper` runs in this case, if not as root.
static ACTING: OnceLock<User> = OnceLock::new();

/// A user with a home and a directory for sockets, and the product where that user can read it.
#[derive(Debug)]
pub struct User {
    /// The id of user and group.
    pub id: u32,
    /// Home directory.
    pub home: PathBuf,
    prefix: PathBuf,
}

impl User {
    /// The user of this number, 0 or 1.
    ///
    /// # Panics
    /// When the user cannot be made.
    #[must_use]
    pub fn new(number: u32) -> Self {
        let id = FIRST_ID + number;
        let base = scratch_base();
        let (home, prefix) = (base.join(format!("user-{id}")), base.join("users-product"));
        // What udev does on every host, and devtmpfs alone does not. The cases of a machine share what is made here.
        host(&format!(
            "set -e; groupadd -f -r kvm; chgrp kvm /dev/kvm; chmod 660 /dev/kvm; chmod 666 /dev/net/tun\n\
             [ -e {prefix} ] || cp -r {} {prefix}\n\
             install -d -m 700 -o {id} -g {id} {home} {home}/run",
            given("HYPER_TEST_PREFIX").display(),
            prefix = prefix.display(),
            home = home.display(),
        ))
        .ok();
        Self { id, home, prefix }
    }

    /// Where the state is without being told.
    #[must_use]
    pub fn data(&self) -> PathBuf {
        self.home.join(".local/share/hyper")
    }

    /// A program as this user, in the groups that `groups` names.
    #[must_use]
    pub fn runs(&self, program: &Path, groups: &str) -> Run {
        let id = self.id.to_string();
        let mut run = Run::new("setpriv").args(&["--reuid", &id, "--regid", &id]);
        run = match groups {
            "" => run.arg("--clear-groups"),
            names => run.args(&["--groups", names]),
        };
        let run = run.arg("--").arg(&program.to_string_lossy());
        run.env("HOME", &self.home).env("XDG_RUNTIME_DIR", self.home.join("run")).without("HYPER_ROOT")
    }

    /// `hyper` as this user.
    #[must_use]
    pub fn hyper(&self) -> Run {
        self.runs(&self.program(), "kvm")
    }

    /// Where this user's `hyper` is.
    #[must_use]
    pub fn program(&self) -> PathBuf {
        self.prefix.join("bin/hyper")
    }
}

/// The one who acts.
pub(crate) fn acting() -> Option<&'static User> {
    ACTING.get()
}

/// Runs a case as a user who is not root: `hyper` is that user's, what the case does on the host beside it is still root's.
///
/// # Panics
/// When the case fails.
pub fn as_user(case: fn()) -> &'static User {
    // Each case has a process of its own, which has one user.
    let user = ACTING.get_or_init(|| User::new(0));
    case();
    user
}

impl User {
    /// Waits until no process of this user is left: the last that goes is the keeper, a few seconds after the last container.
    pub fn is_gone(&self) {
        crate::wait_for("the end of a user's processes", || {
            let left = host(&format!("pgrep -a -u {}", self.id)).done().text();
            left.is_empty().then_some(())
        });
        let left = host(&format!("ls {}", self.home.join("run/hyper").display())).done().text();
        assert!(!left.contains("keeper.sock"), "{left}");
    }
}
