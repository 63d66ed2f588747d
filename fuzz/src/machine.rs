//! What comes from a machine as a whole: the file that it was saved in, and what its agent says.

use hyper_protocol::Doorbell;
use hyper_protocol::rpc::agent;
use hyper_vmm_hv::{MachineState, VcpuState};
use protobuf::Message;

/// The file with a machine's state; the first byte chooses how much of it is taken for granted.
pub(crate) fn snapshot(data: &[u8]) {
    let Some((kind, rest)) = data.split_first() else { return };
    match kind % 3 {
        0 => hyper_vmm::fuzz::snapshot(rest),
        1 => drop(MachineState::from_bytes(rest)),
        _ => drop(VcpuState::from_bytes(rest)),
    }
}

/// What is answered is answered in messages of these kinds.
fn parsed<M: Message>(data: &[u8]) {
    if let Ok(message) = M::parse_from_bytes(data) {
        // What was read can be written, and is the same again.
        if let Ok(bytes) = message.write_to_bytes() {
            let again = M::parse_from_bytes(&bytes);
            assert!(again.is_ok_and(|again| again == message), "it does not come back as it was");
        }
    }
}

/// What the agent says: its first line, a question for a name, an answer.
pub(crate) fn agent(data: &[u8]) {
    let Some((kind, rest)) = data.split_first() else { return };
    match kind % 8 {
        0 => drop(Doorbell::parse(rest)),
        1 | 2 => hyper_sandbox::fuzz::name_query(rest),
        3 => parsed::<agent::ConfigureResponse>(rest),
        4 => parsed::<agent::StatsResponse>(rest),
        5 => parsed::<agent::ListProcessesResponse>(rest),
        6 => parsed::<agent::TakeSpansResponse>(rest),
        _ => parsed::<agent::NextEventsResponse>(rest),
    }
}
