//! `-it` under a real terminal.

use hyper_tests::{Terminal, hyper};

#[test]
pub(crate) fn shell_has_job_control() {
    let terminal = Terminal::start("run --rm -it @busybox sh");
    terminal.wait_for("#");
    terminal.enter("sleep 1000");
    terminal.press(&["C-z"]);
    terminal.wait_for("Stopped");
    terminal.enter("bg; jobs | sed s/^/now:/");
    terminal.wait_for("now:[1]");
    terminal.enter("kill %1; echo en''d");
    terminal.wait_for("end");
    terminal.enter("exit 5");
    terminal.wait_for("ended with 5");
}

#[test]
fn control_c_ends_the_foreground_only() {
    let terminal = Terminal::start("run --rm -it @busybox sh");
    terminal.wait_for("#");
    terminal.enter("sleep 1000; echo after");
    terminal.press(&["C-c"]);
    terminal.enter("echo st''ill here; tty");
    terminal.wait_for("still here");
    terminal.press(&["C-d"]);
    terminal.wait_for("ended with");
}

#[test]
fn resize_arrives() {
    let terminal = Terminal::start("run --rm -it @busybox sh");
    terminal.wait_for("#");
    terminal.enter("echo size: $(stty size)");
    terminal.wait_for("size: 24 80");
    terminal.resize(100, 30);
    terminal.enter("until stty size | grep -x '30 100'; do sleep 0.1; done; echo siz''ed");
    terminal.wait_for("sized");
}

#[test]
fn detach_keys_leave_it_running() {
    let terminal = Terminal::start("run -it --name detachable @busybox sh");
    terminal.wait_for("#");
    terminal.press(&["C-p", "C-q"]);
    terminal.wait_for("ended with 0");
    hyper("inspect --format {{.State.Status}} detachable").ok().says("running");
    let again = Terminal::start("attach detachable");
    again.enter("echo ag''ain");
    again.wait_for("again");
    hyper("rm -f detachable").ok();
}

#[test]
pub(crate) fn exec_has_a_terminal_too() {
    let container = hyper_tests::detached("@busybox sleep 1000");
    let terminal = Terminal::start(&format!("exec -it {} sh", container.id));
    terminal.wait_for("#");
    terminal.enter("tty; exit 3");
    terminal.wait_for("/dev/pts/");
    terminal.wait_for("ended with 3");
}

#[test]
fn terminal_is_demanded_for_t() {
    hyper("run --rm -it @busybox true").fails(1).complains(&["tty"]);
}
