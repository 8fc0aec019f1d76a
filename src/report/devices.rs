//! The document of `devices`.

use serde::Serialize;

use super::table::Table;
use super::{SCHEMA_VERSION, units};
use crate::runtime::DeviceDescription;

/// What this machine can compute on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DeviceList {
    /// Version of this document.
    pub schema_version: u32,
    /// The CPU first.
    pub devices: Vec<DeviceDescription>,
}

impl DeviceList {
    /// A document of these devices.
    pub fn new(devices: Vec<DeviceDescription>) -> Self {
        Self { schema_version: SCHEMA_VERSION, devices }
    }

    /// One line per device; the one that `--device auto` takes is marked.
    pub fn text(&self, width: usize) -> String {
        let bytes = |n: Option<u64>| n.map_or_else(|| "-".to_owned(), units::bytes);
        let mut t =
            Table::new(&["", "device", "kind", ">memory", ">largest matrix", ">tile", "name, driver / why not"]);
        for d in &self.devices {
            let about = match (&d.unusable, d.name.is_empty()) {
                (Some(why), true) => format!("not usable: {why}"),
                (Some(why), false) => format!("{}, {}; not usable: {why}", d.name, d.driver),
                (None, _) => format!("{}, {}", d.name, d.driver),
            };
            t.row([
                if d.automatic { "*" } else { "" }.to_owned(),
                d.id.clone(),
                [d.kind.as_str(), d.interface.as_str()].join(" ").trim().to_owned(),
                bytes(d.memory_bytes),
                bytes(d.max_buffer_bytes),
                bytes(d.max_binding_bytes),
                about,
            ]);
        }
        t.render(width) + "\n* what `--device auto` takes\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_device_has_a_line_and_what_is_missing_a_reason() {
        let device = |id: &str, unusable: Option<&str>| DeviceDescription {
            id: id.into(),
            name: if unusable.is_some() { String::new() } else { "a chip".into() },
            kind: "discrete".into(),
            interface: "vulkan".into(),
            driver: "1.2".into(),
            memory_bytes: Some(8 << 30),
            max_buffer_bytes: None,
            max_binding_bytes: None,
            automatic: unusable.is_none(),
            unusable: unusable.map(str::to_owned),
        };
        let text = DeviceList::new(vec![device("gpu:0", None), device("cuda", Some("no library"))]).text(120);
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[2].starts_with("* ") && lines[2].contains("8.6 GB") && lines[2].contains("a chip, 1.2"),
            "{text}"
        );
        assert!(lines[3].contains("not usable: no library") && !lines[3].contains('*'), "{text}");
    }
}
