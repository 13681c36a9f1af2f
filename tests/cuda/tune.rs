//! Tuning, resuming, evaluating and generating on the device.

use crate::place::{Place, assert_follow, succeeded};

const DTYPES: [(&str, f64); 3] = [("f32", 2e-5), ("bf16", 2e-2), ("f16", 4e-3)];

/// Arguments for a run NAME on the device.
fn tune<'a>(name: &'a str, dtype: &'a str) -> Vec<&'a str> {
    vec!["tune", "dogs.toml", "--device", "cuda", "--set", name, "--set", dtype]
}

#[test]
fn losses_follow_the_cpus_in_every_dtype() {
    let place = Place::new();
    let expected = place.losses_of_the_cpu(&[]);
    assert!(expected.iter().all(|loss| loss.is_finite()) && expected.len() == 6 + 2);
    for (dtype, relative) in DTYPES {
        let dtype = format!("model.dtype={dtype}");
        succeeded(&place.cuda("", tune("name=cuda", &dtype)));
        assert_follow(&place.losses("runs/cuda"), &expected, relative);
        std::fs::remove_dir_all(place.path("runs/cuda")).unwrap();
    }
}

/// The tutorial's own configuration and reviews, on the small checkpoint.
#[test]
fn the_tutorials_steps_follow_the_cpus() {
    let place = Place::new();
    let root = env!("CARGO_MANIFEST_DIR");
    let sets = |name: &str, dtype: &str| {
        let id = format!("model.id={}", place.path("model").display());
        let runs = format!("runs={}", place.path("runs").display());
        [id, runs, format!("name={name}"), format!("model.dtype={dtype}"), "train.max_steps=3".into()]
    };
    let tune = |name: &str, device: &str, dtype: &str| {
        let mut command = place.command("", ["tune", "configs/tutorial.toml", "--device", device]);
        command.current_dir(root).args(sets(name, dtype).iter().flat_map(|set| ["--set", set]));
        succeeded(&command.output().unwrap());
        place.losses(&format!("runs/{name}"))
    };
    let expected = tune("cpu", "cpu", "f32");
    assert_eq!(expected.len(), 3 + 1);
    for (dtype, relative) in DTYPES {
        assert_follow(&tune(dtype, "cuda", dtype), &expected, relative);
    }
}

/// Widths of 40 and 57 and heads of 8: operands of products begin at places that are no multiple of 256 bytes.
#[test]
fn a_checkpoint_of_odd_widths_follows_the_cpus() {
    let place = Place::new();
    let golden = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/granite");
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(golden.join(name), place.path("model").join(name)).unwrap();
    }
    let expected = place.losses_of_the_cpu(&[]);
    for (dtype, relative) in DTYPES {
        let dtype = format!("model.dtype={dtype}");
        succeeded(&place.cuda("", tune("name=cuda", &dtype)));
        assert_follow(&place.losses("runs/cuda"), &expected, relative);
        std::fs::remove_dir_all(place.path("runs/cuda")).unwrap();
    }
}

/// Threads and blocks in other orders give the same bits.
#[test]
fn a_run_repeats_bit_for_bit_in_any_order_of_threads() {
    let place = Place::new();
    let runs = ["order=0", "order=1", "order=7"].map(|order| {
        succeeded(&place.cuda(order, tune("name=cuda", "model.dtype=bf16")));
        let weights = std::fs::read(place.path("runs/cuda/adapter/adapter_model.safetensors")).unwrap();
        std::fs::remove_dir_all(place.path("runs/cuda")).unwrap();
        weights
    });
    assert!(runs[0] == runs[1] && runs[0] == runs[2]);
}

/// A pass for the prefixes, several for the examples, and blocks that are run again in the backward pass.
#[test]
fn split_and_recomputed_steps_follow_the_cpus() {
    let place = Place::new();
    let expected = place.losses_of_the_cpu(&[]);
    for more in [["--set", "train.max_rows=20"], ["--set", "train.accumulate_steps=1"]] {
        succeeded(&place.cuda("", tune("name=cuda", "model.dtype=f32").into_iter().chain(more)));
        assert_follow(&place.losses("runs/cuda"), &expected, 2e-5);
        std::fs::remove_dir_all(place.path("runs/cuda")).unwrap();
    }
}

/// Keys and values, reparameterized prompts, prompts after a text, and the distillation of a text.
#[test]
fn other_prompts_and_losses_follow_the_cpus() {
    let place = Place::new();
    let cases: [&[&str]; 5] = [
        &["prompt.kind=prefix"],
        &["prompt.reparameterization=residual"],
        &["prompt.kind=prefix", "prompt.init_method=random", "prompt.reparameterization=mlp"],
        &["prompt.position=after_head"],
        &["data.teacher_text=dog shiny gentle or happy : say 1 word50 late rude or smelly : say 0 word51"],
    ];
    for case in cases {
        let more: Vec<&str> = case.iter().flat_map(|set| ["--set", set]).collect();
        let expected = place.losses_of_the_cpu(&more);
        for (dtype, relative) in [DTYPES[0], DTYPES[1]] {
            let dtype = format!("model.dtype={dtype}");
            succeeded(&place.cuda("", tune("name=cuda", &dtype).into_iter().chain(more.iter().copied())));
            assert_follow(&place.losses("runs/cuda"), &expected, relative);
            // The kernels read what another device has tuned.
            let generate = [
                "generate", "--model", "model", "--dtype", "f32", "--max-new-tokens", "4", "--adapter",
                "runs/cpu",
            ];
            let [cpu, cuda] = ["cpu", "cuda"].map(|device| {
                succeeded(
                    &place.cuda("", generate.into_iter().chain(["--device", device, "say gentle dog :"])),
                )
            });
            assert_eq!(cpu, cuda, "{case:?}");
            std::fs::remove_dir_all(place.path("runs/cuda")).unwrap();
        }
        std::fs::remove_dir_all(place.path("runs/cpu")).unwrap();
    }
}

#[test]
fn an_interrupted_run_goes_on_bit_for_bit() {
    let place = Place::new();
    let args = |name| [tune(name, "model.dtype=bf16"), vec!["--set", "train.checkpoint_steps=1"]].concat();
    succeeded(&place.cuda("", args("name=one")));
    // Ends by itself after the third step, as by Ctrl-C.
    let mut child = place.command("", args("name=two")).spawn().unwrap();
    let metrics = place.path("runs/two/metrics.jsonl");
    while std::fs::read_to_string(&metrics).map_or(0, |text| text.lines().count()) < 2 {
        assert!(child.try_wait().unwrap().is_none(), "it ended before the second step");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    // SAFETY: a signal to a child that has not been waited for.
    assert_eq!(unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGINT) }, 0);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    succeeded(&place.cuda("", ["tune", "--resume", "runs/two"]));
    assert_eq!(place.losses("runs/one"), place.losses("runs/two"));
    let weights =
        |run: &str| std::fs::read(place.path(run).join("adapter/adapter_model.safetensors")).unwrap();
    assert!(weights("runs/one") == weights("runs/two"));
}

#[test]
fn evaluation_and_generation_agree_with_the_cpus() {
    let place = Place::new();
    place.losses_of_the_cpu(&[]);
    let eval = |device, out| ["eval", "dogs.toml", "--adapter", "runs/cpu", "--device", device, "--out", out];
    for device in ["cpu", "cuda"] {
        std::fs::create_dir(place.path(device)).unwrap();
        succeeded(&place.cuda("", eval(device, device)));
    }
    let predictions = |device| std::fs::read_to_string(place.path(device).join("predictions.csv")).unwrap();
    for (cpu, cuda) in predictions("cpu").split([',', '\n']).zip(predictions("cuda").split([',', '\n'])) {
        match (cpu.parse::<f64>(), cuda.parse::<f64>()) {
            // Probabilities have six digits.
            (Ok(a), Ok(b)) => assert!((a - b).abs() < 5e-6, "{a} and {b}"),
            _ => assert_eq!(cpu, cuda),
        }
    }
    for adapter in [&[][..], &["--adapter", "runs/cpu"]] {
        let [cpu, cuda] = ["cpu", "cuda"].map(|device| {
            let args = [
                "generate", "--model", "model", "--dtype", "f32", "--device", device, "--max-new-tokens", "6",
            ];
            let text = ["say gentle dog word50 :"];
            succeeded(&place.cuda("", args.into_iter().chain(adapter.iter().copied()).chain(text)))
        });
        assert_eq!(cpu, cuda);
    }
}
