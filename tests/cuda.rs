//! The CUDA backend against the CPU: every operation, every fixture, the same bits twice.
//!
//! Without an NVIDIA card the tests say so and pass, unless GQA2MLA_REQUIRE_CUDA is set, as it is where they have to run.
//! `scripts/check_cuda.sh` runs them on a processor that stands in for the card.
#![cfg(feature = "cuda")]

mod device_properties;

use std::sync::OnceLock;

use device_properties::{assert_close, bf16, noise, on_every_device, or_skip};
use gqa2mla::runtime::cuda::{Cuda, cards, open, open_limited};
use gqa2mla::runtime::{Backend, Cpu, Device, DeviceChoice, devices};

/// The first card, opened once.
fn card() -> Option<&'static Cuda> {
    static CARD: OnceLock<Option<Cuda>> = OnceLock::new();
    let found = CARD.get_or_init(|| first().map(|index| open(index).unwrap()));
    or_skip(found.as_ref(), "NVIDIA card", "GQA2MLA_REQUIRE_CUDA")
}

fn first() -> Option<usize> {
    cards().ok()?.iter().position(|c| c.unusable.is_none())
}

on_every_device!(card);

#[test]
fn a_conversion_calibrated_on_a_card_is_that_of_the_cpu_to_rounding() {
    if card().is_some() {
        device_properties::a_conversion_calibrated_there_is_that_of_the_cpu_to_rounding(DeviceChoice::Cuda(None));
    }
}

#[test]
fn what_does_not_fit_is_an_error_that_says_what_to_do() {
    if card().is_none() {
        return;
    }
    let index = first().unwrap();
    device_properties::what_does_not_fit_is_an_error_that_says_what_to_do(&open(index).unwrap());
    assert!(open(99).unwrap_err().to_string().contains("no such card"));
}

#[test]
fn weights_are_widened_in_parts() {
    if card().is_none() {
        return;
    }
    let card = open_limited(first().unwrap(), 7 * 4 * 31).unwrap();
    let (x, weight, bias) = (noise(20, 31, 1), bf16(45, 31, 2), noise(1, 45, 3));
    let (x_there, w, b) = (card.upload(x.clone()), card.upload_weight(weight.clone()), card.upload(bias.clone()));
    let found = card.download(card.linear(&x_there, &w, Some(&b))).unwrap();
    assert_close("linear", &found, &Cpu.linear(&x, &weight, Some(&bias)), 31, 31f32.sqrt());
}

#[test]
fn a_card_is_listed_opened_by_name_and_taken_before_vulkan() {
    if card().is_none() {
        return;
    }
    let index = first().unwrap();
    let listed = devices();
    let this = listed.iter().find(|d| d.id == format!("cuda:{index}")).unwrap();
    assert!(this.automatic && this.memory_bytes.is_some_and(|bytes| bytes > 0) && !this.name.is_empty(), "{this:?}");
    for choice in [DeviceChoice::Cuda(None), DeviceChoice::Cuda(Some(index)), DeviceChoice::Auto] {
        let device = Device::open(choice).unwrap();
        assert!(device.name().starts_with(&format!("cuda:{index} (")), "{choice}: {}", device.name());
    }
    assert!(Device::open(DeviceChoice::Cuda(Some(99))).unwrap_err().to_string().contains("cuda:"));
}
