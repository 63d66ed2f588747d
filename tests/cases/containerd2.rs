//! containerd 2 with this runtime, by the verbs of its `ctr`.

use hyper_tests::Release;

use crate::containerd::{lives, runs, tells};

#[test]
fn run_prints_and_returns_the_code() {
    runs(Release::Two);
}

#[test]
fn task_goes_through_its_life() {
    lives(Release::Two);
}

#[test]
fn events_come_in_order() {
    tells(Release::Two);
}
