//! Which device, and devices that can't be used.

use crate::place::{Place, refused, stderr, succeeded};

fn tune(device: &str) -> [&str; 6] {
    ["tune", "dogs.toml", "--device", device, "--set", "train.num_epochs=1"]
}

#[test]
fn the_second_device_is_used_if_it_is_named() {
    let place = Place::new();
    let opened = |place: &Place, device: &str| place.calls().contains_key(&("device".into(), device.into()));
    succeeded(&place.cuda("devices=2", tune("cuda:1")));
    assert!(opened(&place, "1") && !opened(&place, "0"));
    let one = place.losses("runs/dogs");
    std::fs::remove_dir_all(place.path("runs/dogs")).unwrap();
    succeeded(&place.cuda("devices=2", tune("cuda")));
    assert_eq!(one, place.losses("runs/dogs"));
    refused(&place.cuda("devices=2", tune("cuda:2")), 2, &["cuda:2", "cuda:0 to cuda:1"]);
}

#[test]
fn without_a_device_auto_takes_the_cpu_and_cuda_is_an_error() {
    let place = Place::new();
    refused(
        &place.cuda("devices=0", tune("cuda")),
        2,
        &["no CUDA-capable device", "nvidia-smi", "--device cpu"],
    );
    let output = place.cuda("devices=0", tune("auto"));
    succeeded(&output);
    assert!(stderr(&output).contains("the CPU is used"), "{}", stderr(&output));
}

#[test]
fn a_driver_that_is_too_old_is_named() {
    let place = Place::new();
    for (setting, found) in [("driver=12040", "12.4"), ("driver=12090", "12.9")] {
        refused(&place.cuda(setting, tune("cuda")), 2, &["driver", "toolkit", "13.0", found]);
    }
}

#[test]
fn every_supported_generation_loads_its_code() {
    let place = Place::new();
    for capability in ["80", "86", "89", "90", "100", "120"] {
        succeeded(&place.cuda(&format!("capability={capability}"), tune("cuda")));
        std::fs::remove_dir_all(place.path("runs/dogs")).unwrap();
    }
    refused(&place.cuda("capability=75", tune("cuda")), 2, &["7.5", "8.0"]);
}

#[test]
fn without_memory_pools_it_works_and_warns() {
    let place = Place::new();
    let output = place.cuda("pools=0", tune("cuda"));
    succeeded(&output);
    assert!(stderr(&output).contains("no memory pools"), "{}", stderr(&output));
}

/// Where the device reads pageable memory itself, no upload may outlive the memory that it reads: weights and tables (a
/// driver takes what is small with the call).
#[test]
fn uploads_are_safe_where_the_device_reads_host_memory() {
    let place = Place::new();
    succeeded(&place.cuda("coherent=1024", tune("cuda")));
    let eval = ["eval", "dogs.toml", "--adapter", "runs/dogs", "--device", "cuda", "--dtype", "bf16"];
    succeeded(&place.cuda("coherent=1024", eval));
}
