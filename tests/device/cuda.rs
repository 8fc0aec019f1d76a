//! The CUDA backend against the CPU: every operation, every fixture, the same bits twice.
//!
//! Without an NVIDIA card the tests say so and pass, unless GQA2MLA_REQUIRE_CUDA is set, as it is where they have to run.
//! `scripts/check_cuda.sh` runs them on a processor that stands in for the card.

use std::sync::OnceLock;

use gqa2mla::runtime::cuda::{Cuda, cards, open, open_limited};
use gqa2mla::runtime::{Backend, Cpu, Device, DeviceChoice, HeadColumns, Precision, devices};
use ndarray::Array2;

use super::properties::{self, assert_close, bf16, noise, on_every_device, or_skip};

/// The first card, opened once.
fn card() -> Option<&'static Cuda> {
    static CARD: OnceLock<Option<Cuda>> = OnceLock::new();
    let found = CARD.get_or_init(|| first().map(|index| open(index, Precision::F32).unwrap()));
    or_skip(found.as_ref(), "NVIDIA card", "GQA2MLA_REQUIRE_CUDA")
}

fn first() -> Option<usize> {
    cards().ok()?.iter().position(|c| c.unusable.is_none())
}

on_every_device!(card);

#[test]
fn a_conversion_calibrated_on_a_card_is_that_of_the_cpu_to_rounding() {
    if card().is_some() {
        properties::a_conversion_calibrated_there_is_that_of_the_cpu_to_rounding(DeviceChoice::Cuda(
            None,
            Precision::F32,
        ));
    }
}

#[test]
fn what_does_not_fit_is_an_error_that_says_what_to_do() {
    if card().is_none() {
        return;
    }
    let index = first().unwrap();
    properties::what_does_not_fit_is_an_error_that_says_what_to_do(&open(index, Precision::F32).unwrap());
    assert!(open(99, Precision::F32).unwrap_err().to_string().contains("no such card"));
}

#[test]
fn products_whose_parts_are_large_are_cut() {
    if card().is_none() {
        return;
    }
    let card = open_limited(first().unwrap(), Precision::F32, 4 * 3 * 20 * 9).unwrap();
    let (x, weight, bias) = (noise(20, 31, 1), bf16(45, 31, 2), noise(1, 45, 3));
    let (x_there, w, b) =
        (card.upload(x.clone()), card.upload_weight(weight.clone().into()), card.upload(bias.clone()));
    let found = card.download(card.linear(&x_there, &w, Some(&b))).unwrap();
    assert_close("linear", &found, &Cpu.linear(&x, &weight.clone().into(), Some(&bias)), 31, 31f32.sqrt());
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
    for choice in
        [DeviceChoice::Cuda(None, Precision::F32), DeviceChoice::Cuda(Some(index), Precision::F32), DeviceChoice::Auto]
    {
        let device = Device::open(choice).unwrap();
        assert!(device.name().starts_with(&format!("cuda:{index} (")), "{choice}: {}", device.name());
    }
    assert!(Device::open(DeviceChoice::Cuda(Some(99), Precision::F32)).unwrap_err().to_string().contains("cuda:"));
}

#[test]
fn products_in_bf16_are_those_of_rounded_operands() {
    if card().is_none() {
        return;
    }
    let card = open(first().unwrap(), Precision::Bf16).unwrap();
    let rounded = |x: &Array2<f32>| x.mapv(|v| half::bf16::from_f32(v).to_f32());
    let (x, weight, bias) = (noise(20, 31, 1), noise(45, 31, 2), noise(1, 45, 3));
    let (x_there, w, b) =
        (card.upload(x.clone()), card.upload_weight(weight.clone().into()), card.upload(bias.clone()));
    let found = card.download(card.linear(&x_there, &w, Some(&b))).unwrap();
    let expected = Cpu.linear(&rounded(&x), &rounded(&weight).into(), Some(&bias));
    assert_close("linear", &found, &expected, 31, 31f32.sqrt());
    let of = HeadColumns { start: 0, stride: 15, width: 9 };
    let x = noise(20, 3 * 31, 4);
    let found = card.download(card.head_linear(&card.upload(x.clone()), &w, of, 3, false)).unwrap();
    let expected = Cpu.head_linear(&rounded(&x), &rounded(&weight).into(), of, 3, false);
    assert_close("head_linear", &found, &expected, 31, 31f32.sqrt());
    assert!(found != Cpu.head_linear(&x, &weight.clone().into(), of, 3, false));
}

#[test]
fn products_on_tensor_cores_lose_no_bit_of_an_activation() {
    let Some(card) = card() else { return };
    // Each output is one activation: what comes back is what went in, largest, least and not finite ones too.
    let values =
        [1.0 / 3.0, f32::MAX, f32::MIN, -1.1754944e-38, 16_777_215.0, f32::INFINITY, f32::NAN, -0.1, 1e-30, 0.0];
    let rows = 16;
    for value in values {
        let x = Array2::from_elem((rows, 1), value);
        let w = card.upload_weight(Array2::from_elem((8, 1), 1.0).into());
        let found = card.download(card.linear(&card.upload(x), &w, None)).unwrap();
        assert!(found.iter().all(|y| *y == value || (y.is_nan() && value.is_nan())), "{value}: {found}");
    }
}
