//! Machines that were booted once, saved when their agent served, and are cloned for every container of their shape.
//!
//! ```text
//! start: no template that fits --> cold boot          make (after it): boot, pause, save, rename
//!        one is there --> Restore --fails--> removed, cold boot
//! ```
//!
//! Nothing of a container is ever in a template: no disk, no share, no address, no process but the agent. In place of disks it has files
//! without content, and the drivers of clones are told of the size of their own. What makes a clone somebody is
//! given to it by `Configure`, before anything else runs: entropy, clock, host name, hardware and network addresses.
//!
//! A template is a folder `templates/vm-<hash>` with `inputs.json` (all that it was made from), `state` and `memory`. Files: `inputs`
//! (what must be the same), `store` (find, keep, clean up), `make`.

mod inputs;
mod make;
mod store;

use std::fs::File;

use hyper_protocol::rpc::agent::{ConfigureRequest, ConfigureResponse};

pub(crate) use self::inputs::{Inputs, MachineShape};
pub(crate) use self::make::make;
use super::VmError;
use super::guest::{Guest, Steps};
use super::plan::GuestPlan;
use crate::{Home, SandboxError};

/// The switch.
const VARIABLE: &str = "HYPER_TEMPLATE";

/// Whether machines are started from templates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TemplateMode {
    /// When there is one; otherwise one is made afterwards.
    Auto,
    /// Never, and none is made.
    Never,
    /// Always: one is made first when it is missing, and what cannot start from one does not start.
    Always,
}

impl TemplateMode {
    /// From `HYPER_TEMPLATE`; without it, [`TemplateMode::Auto`].
    pub(crate) fn from_env() -> Result<Self, VmError> {
        let text = std::env::var_os(VARIABLE).unwrap_or_default();
        Self::parse(&text.to_string_lossy())
    }

    fn parse(text: &str) -> Result<Self, VmError> {
        match text {
            "" | "auto" => Ok(Self::Auto),
            "never" => Ok(Self::Never),
            "always" => Ok(Self::Always),
            other => Err(VmError::TemplateMode(other.to_owned())),
        }
    }
}

/// A saved machine, open.
#[derive(Debug)]
pub(crate) struct Template {
    pub(crate) state: File,
    pub(crate) memory: File,
}

/// Hardware address of interface `index` while a machine is being saved; clones get their own.
pub(crate) fn mac_of(index: usize) -> [u8; 6] {
    [2, 0, 0, 0, 0, u8::try_from(index).unwrap_or(u8::MAX)]
}

fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// A machine that was started and configured.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) guest: Guest,
    pub(crate) configured: ConfigureResponse,
    /// The template that would have been used, had there been one.
    pub(crate) lacking: Option<MachineShape>,
}

/// Starts a machine and configures it: from a template if there is one that fits and works, else from its kernel.
pub(crate) async fn start(
    home: &Home,
    plan: GuestPlan,
    request: ConfigureRequest,
    steps: &mut Steps,
) -> Result<Started, SandboxError> {
    let mode = TemplateMode::from_env()?;
    let shape = match (mode, MachineShape::of(&plan)) {
        (TemplateMode::Never, _) | (TemplateMode::Auto, Err(_)) => {
            return Ok(configured(home, plan, request, steps).await?);
        }
        (TemplateMode::Always, Err(why)) => return Err(VmError::NoTemplate(why.to_owned()).into()),
        (_, Ok(shape)) => shape,
    };
    let inputs = shape.inputs(home.parts())?;
    let mut found = store::open(home, &inputs);
    if found.is_none() && mode == TemplateMode::Always {
        make::make_or_wait(home, &shape).await?;
        found = store::open(home, &inputs);
        steps.done("template-made");
    }
    if let Some(template) = found {
        let clone = plan.try_clone()?.going_on_from(template);
        match configured(home, clone, found_as_saved(request.clone()), steps).await {
            Err(error) if mode == TemplateMode::Auto => {
                tracing::warn!(%error, "the template cannot be used, so the machine is booted");
                store::condemn(home, &inputs);
                steps.done("template-failed");
            }
            started => return Ok(started?),
        }
    } else if mode == TemplateMode::Always {
        return Err(VmError::NoTemplate("its template is gone again".to_owned()).into());
    }
    let started = configured(home, plan, request, steps).await?;
    Ok(Started { lacking: Some(shape), ..started })
}

/// Has a machine go on from one that was saved, and configures it; it is configured as one that was found so. When that fails, the machine
/// has ended.
pub(crate) async fn go_on(
    home: &Home,
    plan: GuestPlan,
    saved: Template,
    request: ConfigureRequest,
    steps: &mut Steps,
) -> Result<Started, SandboxError> {
    Ok(configured(home, plan.going_on_from(saved), request, steps).await?)
}

/// Interfaces have the addresses that they were saved with, until they are given their own.
fn found_as_saved(mut request: ConfigureRequest) -> ConfigureRequest {
    for (index, interface) in request.interfaces.iter_mut().enumerate() {
        interface.found_mac = mac_text(mac_of(index));
    }
    request
}

/// Starts a machine as planned and configures it; when that fails, the machine has ended.
async fn configured(
    home: &Home,
    plan: GuestPlan,
    request: ConfigureRequest,
    steps: &mut Steps,
) -> Result<Started, VmError> {
    let guest = Guest::start(plan, home.parts(), steps).await?;
    match guest.configure(request).await {
        Ok(configured) => Ok(Started { guest, configured, lacking: None }),
        Err(error) => {
            guest.kill().await;
            Err(error)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_switch_has_three_positions() {
        assert_eq!(TemplateMode::parse("").unwrap(), TemplateMode::Auto);
        assert_eq!(TemplateMode::parse("auto").unwrap(), TemplateMode::Auto);
        assert_eq!(TemplateMode::parse("never").unwrap(), TemplateMode::Never);
        assert_eq!(TemplateMode::parse("always").unwrap(), TemplateMode::Always);
        let error = TemplateMode::parse("yes").unwrap_err().to_string();
        assert!(error.contains("\"yes\"") && error.contains("auto, never or always"), "{error}");
    }

    #[test]
    fn interfaces_are_told_apart() {
        assert_eq!(mac_text(mac_of(3)), "02:00:00:00:00:03");
    }
}
