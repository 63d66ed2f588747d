//! Logs that are whole, changed, and cut short.

use super::*;

fn log() -> (tempfile::TempDir, AuditLog) {
    let dir = tempfile::tempdir().unwrap();
    let log = AuditLog { dir: dir.path().to_owned(), max_bytes: 2000 };
    (dir, log)
}

fn fill(log: &AuditLog, count: usize) {
    for number in 0..count {
        log.append("container start", &format!("id{number}"), "web", "").unwrap();
    }
}

fn checked(log: &AuditLog) -> Result<(Head, Vec<String>), AuditError> {
    let mut seen = Vec::new();
    let head = log.verify(None, &mut |record| seen.push(record.subject.clone()))?;
    Ok((head, seen))
}

#[test]
fn records_follow_from_one_another_across_files() {
    let (_dir, log) = log();
    assert_eq!(checked(&log).unwrap().0.seq, 0);
    fill(&log, 20);
    assert!(log.kept().unwrap().len() > 1);
    let (head, seen) = checked(&log).unwrap();
    assert_eq!((head.seq, seen.len(), seen[19].as_str()), (20, 20, "id19"));
    log.verify(Some(&head), &mut |_| {}).unwrap();
    // The oldest files may be kept elsewhere.
    fs::remove_file(&log.kept().unwrap()[0]).unwrap();
    assert_eq!(checked(&log).unwrap().0, head);
    let failed: Result<(), SandboxError> = Err(SandboxError::NoSuchContainer("x".into()));
    assert!(log.note("image pull", "x", "", failed).is_err());
    let mut last = None;
    log.verify(Some(&head), &mut |record| last = Some(record.clone())).unwrap();
    let last = last.unwrap();
    assert_eq!(
        (last.seq, last.error.as_str(), last.uid),
        (21, "No such container: x", rustix::process::getuid().as_raw())
    );
}

#[test]
fn whatever_is_changed_taken_out_or_put_in_is_seen() {
    let (_dir, mut log) = log();
    log.max_bytes = u64::MAX;
    fill(&log, 5);
    let path = log.dir.join(NOW);
    let whole = fs::read_to_string(&path).unwrap();
    let lines: Vec<&str> = whole.lines().collect();
    let (head, _) = checked(&log).unwrap();
    for at in 0..lines.len() {
        let without: Vec<&str> =
            lines.iter().enumerate().filter(|(n, _)| *n != at).map(|(_, l)| *l).collect();
        fs::write(&path, without.join("\n") + "\n").unwrap();
        let first = AuditRecord::open(without[0]).unwrap().0.seq;
        // What comes before the first is not known; the first is told.
        assert_eq!(log.verify(Some(&head), &mut |_| {}).is_err(), first == 1, "without {at}");
        let mut twice = lines.clone();
        twice.insert(at, lines[at]);
        fs::write(&path, twice.join("\n") + "\n").unwrap();
        assert!(checked(&log).is_err(), "{at} twice");
        let mut changed: Vec<String> = lines.iter().map(|line| (*line).to_owned()).collect();
        changed[at] = changed[at].replace("\"web\"", "\"wed\"");
        fs::write(&path, changed.join("\n") + "\n").unwrap();
        assert!(log.verify(Some(&head), &mut |_| {}).is_err(), "{at} changed");
    }
    // A record made anew has another hash, and what follows does not follow from it.
    let (mut forged, _) = AuditRecord::open(lines[2]).unwrap();
    forged.detail = "innocent".into();
    let mut changed: Vec<String> = lines.iter().map(|line| (*line).to_owned()).collect();
    changed[2] = forged.seal().unwrap().0;
    fs::write(&path, changed.join("\n") + "\n").unwrap();
    assert!(checked(&log).unwrap_err().to_string().contains("record 4 does not follow"));
    // An end that was cut off is seen by whoever kept the head.
    fs::write(&path, lines[..3].join("\n") + "\n").unwrap();
    assert_eq!(checked(&log).unwrap().0.seq, 3);
    assert!(matches!(log.verify(Some(&head), &mut |_| {}), Err(AuditError::OtherHead { seq: 5, .. })));
}

#[test]
fn a_log_that_was_cut_short_at_any_byte_goes_on() {
    let (_dir, mut log) = log();
    log.max_bytes = u64::MAX;
    fill(&log, 3);
    let path = log.dir.join(NOW);
    let whole = fs::read(&path).unwrap();
    let line = whole.iter().position(|byte| *byte == b'\n').unwrap() + 1;
    for len in (0..=whole.len()).rev().step_by(13) {
        fs::write(&path, &whole[..len]).unwrap();
        fill(&log, 2);
        let (head, seen) = checked(&log).unwrap();
        assert!(seen.iter().rev().take(2).eq(["id1", "id0"].iter()), "{len}: {seen:?}");
        assert_eq!(head.seq, seen.len() as u64);
        // And once more, in what was written of that.
        let now = fs::read(&path).unwrap();
        for cut in (len..now.len()).step_by(61) {
            fs::write(&path, &now[..cut]).unwrap();
            checked(&log).unwrap();
            fill(&log, 1);
            checked(&log).unwrap();
        }
    }
    // But a torn line in the middle that nobody spoke of is none of ours.
    let mut middle = whole[..line + 10].to_vec();
    middle.push(b'\n');
    middle.extend_from_slice(&whole[line..]);
    fs::write(&path, middle).unwrap();
    assert!(checked(&log).is_err());
}
