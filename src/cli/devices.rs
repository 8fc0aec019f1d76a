//! `gqa2mla devices`, and the option by which other commands take one.

use anyhow::{Context as _, bail};
use clap::Args;
use gqa2mla::observe::{Event, Observer};
use gqa2mla::report::DeviceList;
use gqa2mla::runtime::{Backend, Cpu, Device, DeviceChoice, devices};

use super::Context;
use super::exit::ExitStatus;
use super::output::width;

/// List the devices that can compute, with memory and limits, and why others cannot.
///
/// --device of other commands takes an id of this list. A GPU is used through Vulkan, Metal or DX12; NVIDIA cards also
/// through CUDA, in builds with the feature `cuda`.
#[derive(Debug, Args)]
pub struct DevicesArgs {}

impl DevicesArgs {
    /// Run the command.
    ///
    /// # Errors
    /// When stdout cannot be written.
    pub fn execute(self, context: &Context) -> anyhow::Result<ExitStatus> {
        context.show(&DeviceList::new(devices()), |d| d.text(width()))?;
        Ok(ExitStatus::Done)
    }
}

/// Where a command computes, if the user does not say: on the best GPU there is.
#[derive(Debug, Clone, Copy, Args)]
#[command(next_help_heading = "Device")]
pub struct DeviceOption {
    /// Where to compute: auto (a GPU that is no software, else the CPU), cpu, gpu[:N], vulkan, metal or cuda[:N][:bf16]
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: DeviceChoice,
}

impl DeviceOption {
    /// Open the device, and say which where that is news.
    ///
    /// # Errors
    /// A device that is not there, or whose driver fails.
    pub fn open(self, context: &Context) -> anyhow::Result<Device> {
        open(self.device, context)
    }

    /// The processor, for an option that needs it.
    ///
    /// # Errors
    /// Another device that the user named.
    pub fn cpu(self, option: &str) -> anyhow::Result<Cpu> {
        match self.device {
            DeviceChoice::Auto | DeviceChoice::Cpu => Ok(Cpu),
            other => bail!("{option} works on the processor only, not on `{other}`\n\nhint: use `--device cpu`"),
        }
    }
}

/// As [`DeviceOption::open`].
///
/// # Errors
/// A device that is not there, or whose driver fails.
pub fn open(choice: DeviceChoice, context: &Context) -> anyhow::Result<Device> {
    let device = Device::open(choice).with_context(|| format!("cannot compute on `{choice}`"))?;
    let name = device.name();
    if device.is_software_gpu() {
        let text = format!("{name} is the processor pretending to be a GPU: `--device cpu` is far faster");
        context.progress.event(Event::Warning(text));
    } else if choice == DeviceChoice::Auto && name != "cpu" {
        context.progress.event(Event::Note(format!("computing on {name}; `--device cpu` to compare")));
    }
    Ok(device)
}

/// Keep a layer of Mesa's Vulkan from looking for a display, and from complaining on stderr where there is none.
pub fn quieten() {
    const DISABLE: &str = "NODEVICE_SELECT";
    if std::env::var_os(DISABLE).is_none() {
        // SAFETY: called before the first thread is started.
        unsafe { std::env::set_var(DISABLE, "1") };
    }
}
