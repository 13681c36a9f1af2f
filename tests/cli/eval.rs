//! Tuned against base.

use super::*;
use gneiss::evaluate::{Answers, Arm, By, Evaluation};
use gneiss::prompt::Prefix;

#[test]
fn eval_answers_with_both_arms() {
    let place = Place::new();
    place.gneiss(["tune", "dogs.toml", "--set", "train.num_epochs=200"]).success();
    let eval = ["eval", "dogs.toml", "--adapter", "runs/dogs/adapter"];
    let (stdout, stderr) = texts(&place.gneiss(eval).success());
    for part in [
        "test.csv: 6 rows",
        "base, hard prompt  tuned, soft prompt",
        "accuracy, generated",
        "macro F1, label likelihood",
        "perplexity of the outputs",
        "answers that are no label",
        // Six rows, all right: SciPy's binomtest(6, 6).proportion_ci(method="wilson").
        "[61.0, 100.0]",
        // binomtest(6, 6) says 0.03125.
        "tuned minus base, generated: +100.0 points [100.0, 100.0], McNemar p = 0.031; 6 rows fixed, 0 broken",
        "tuned minus base, label likelihood: ",
        "base, generated  precision  recall     F1  rows  said 0  said 1  no label\n",
        "  1                  0.000   0.000  0.000     3       0       0         3\n",
        "tuned, generated  precision  recall     F1  rows  said 0  said 1\n",
        "  1                   1.000   1.000  1.000     3       0       3\n",
        // The base model is random and answers with any word.
        "base: 6 answers are no label and count as wrong",
        "  line 2: ",
        ", expected \"1\": shiny dog word40",
    ] {
        assert!(stdout.contains(part), "expected {part:?} in: {stdout}");
    }
    assert!(stderr.contains("dogs       6 rows in") && !stdout.contains("rows in"), "{stderr}");
    let written = "results    runs/dogs/evaluation.json and runs/dogs/predictions.csv";
    assert!(stderr.contains(written), "{stderr}");

    // The run's folder is as good as its adapter's.
    let eval = ["eval", "dogs.toml", "--adapter", "runs/dogs", "--json"];
    let (stdout, _) = texts(&place.gneiss(eval).success());
    let result: Evaluation = serde_json::from_str(&stdout).unwrap();
    let kept = std::fs::read_to_string(place.path("runs/dogs/evaluation.json")).unwrap();
    assert_eq!(serde_json::from_str::<Evaluation>(&kept).unwrap(), result);
    assert_eq!((result.labels.join(" "), result.hard_prompt.as_str()), ("0 1".into(), "say 1 or 0"));
    let [base, tuned] = &result.arms[..] else { panic!("{stdout}") };
    assert_eq!((base.name.as_str(), base.adapter.as_deref()), ("base", None));
    assert_eq!((tuned.name.as_str(), tuned.adapter.as_deref()), ("dogs", Some("runs/dogs/adapter")));
    let pairs: Vec<_> = result.pairs.iter().map(|pair| (pair.name.as_str(), pair.by)).collect();
    assert_eq!(pairs, [("dogs", By::Generated), ("dogs", By::Likelihood)]);
    for arm in [base, tuned] {
        let Answers { predictions, generated, likelihood, text, .. } = &arm.answers;
        assert_eq!(predictions.iter().map(|p| p.line).collect::<Vec<_>>(), [2, 3, 4, 5, 6, 7]);
        let sums = predictions.iter().map(|p| p.probabilities.iter().sum::<f64>());
        sums.for_each(|sum| assert!((sum - 1.0).abs() < 1e-9, "{sum}"));
        let (generated, likelihood) = (generated.as_ref().unwrap(), likelihood.as_ref().unwrap());
        assert_eq!((generated.total, likelihood.total, likelihood.no_label, text), (6, 6, 0, &None));
    }
    let scores =
        |arm: &Arm| (arm.answers.generated.clone().unwrap(), arm.answers.likelihood.clone().unwrap());
    assert_eq!(scores(base).0.no_label, 6);
    assert_eq!(scores(tuned).0.no_label, 0, "a tuned prompt answers with labels");
    assert!(scores(tuned).1.correct >= scores(base).1.correct, "{stdout}");
    assert!(tuned.answers.perplexity < base.answers.perplexity, "{stdout}");
}

#[test]
fn eval_puts_several_prompts_side_by_side() {
    let place = Place::new();
    place.gneiss(["tune", "dogs.toml", "--set", "train.num_epochs=100"]).success();
    place.gneiss(["tune", "dogs.toml", "--set", "name=cats", "--set", "train.num_epochs=1"]).success();
    let eval = ["eval", "dogs.toml", "--adapter", "runs/dogs", "--adapter", "runs/cats/adapter"];
    let (stdout, stderr) = texts(&place.gneiss(eval).success());
    for part in [
        "base, hard prompt ", "dogs minus base, generated: ", "cats minus base, generated: ",
        "cats minus base, label likelihood: ", "\ncats, label likelihood  precision ",
    ] {
        assert!(stdout.contains(part), "expected {part:?} in: {stdout}");
    }
    assert!(stderr.contains("results    runs/dogs.eval/evaluation.json and "), "{stderr}");
    // Each run gets its own part.
    for name in ["dogs", "cats"] {
        let own: Evaluation =
            serde_json::from_value(place.json(&format!("runs/{name}/evaluation.json"))).unwrap();
        assert_eq!(own.arms.iter().map(|arm| arm.name.as_str()).collect::<Vec<_>>(), ["base", name]);
        assert!(own.pairs.len() == 2 && own.pairs.iter().all(|pair| pair.name == name));
        let report = std::fs::read_to_string(place.path(&format!("runs/{name}/report.html"))).unwrap();
        assert!(report.contains("<section id=\"evaluation\">"), "{name}");
    }
    let before = place.files("runs/cats");
    let kept = std::fs::read_to_string(place.path("runs/dogs.eval/evaluation.json")).unwrap();
    let kept: Evaluation = serde_json::from_str(&kept).unwrap();
    let [base, dogs, cats] = ["base", "dogs", "cats"];
    assert_eq!(kept.arms.iter().map(|arm| arm.name.as_str()).collect::<Vec<_>>(), [base, dogs, cats]);
    assert_ne!(kept.arms[1].answers.perplexity, kept.arms[2].answers.perplexity);
    let pairs: Vec<_> = kept.pairs.iter().map(|pair| (pair.name.as_str(), pair.by)).collect();
    let (generated, likelihood) = (By::Generated, By::Likelihood);
    assert_eq!(pairs, [(dogs, generated), (cats, generated), (dogs, likelihood), (cats, likelihood)]);

    let mut table = csv::Reader::from_path(place.path("runs/dogs.eval/predictions.csv")).unwrap();
    let header = "line,input,expected,base,dogs,cats,base_likeliest,dogs_likeliest,cats_likeliest,\
                  base P(0),base P(1),dogs P(0),dogs P(1),cats P(0),cats P(1)";
    assert_eq!(table.headers().unwrap().iter().collect::<Vec<_>>().join(","), header);
    assert_eq!(table.records().count(), 6);

    let eval = ["eval", "dogs.toml", "--adapter", "runs/cats", "--out", "results/cats"];
    let (_, stderr) = texts(&place.gneiss(eval).success());
    assert!(stderr.contains("results/cats/predictions.csv"), "{stderr}");
    assert_eq!(place.files("results/cats").len(), 2);
    assert_eq!(place.files("runs/cats"), before);
}

#[test]
fn eval_of_texts_gives_their_metrics_and_a_table_that_reads_back() {
    let place = Place::new();
    place.gneiss(["tune", "dogs.toml"]).success();
    let rows = [
        ("shiny, \"happy\" dog", "happy dog"),
        ("two\nlines; of dog", "=1, or 0"),
        ("späte 狗 dog", "rude dog"),
    ];
    let mut file = csv::Writer::from_path(place.path("texts.csv")).unwrap();
    file.write_record(["input", "output"]).unwrap();
    rows.iter().for_each(|(input, output)| file.write_record([input, output]).unwrap());
    file.flush().unwrap();
    let sets = ["--set", "data.task=generation", "--set", "data.test=texts.csv", "--json"];
    let eval = ["eval", "dogs.toml", "--adapter", "runs/dogs"].into_iter().chain(sets);
    let (stdout, _) = texts(&place.gneiss(eval.clone()).success());
    let result: Evaluation = serde_json::from_str(&stdout).unwrap();
    assert!(result.labels.is_empty());
    assert_eq!(
        result.pairs.iter().map(|p| p.by).collect::<Vec<_>>(),
        [By::Generated, By::TokenF1, By::RougeL]
    );
    for arm in &result.arms {
        let Answers { predictions, generated, likelihood, text, perplexity, .. } = &arm.answers;
        assert!(generated.is_none() && likelihood.is_none() && *perplexity > 1.0);
        assert_eq!(text.as_ref().unwrap().total, 3);
        assert!(predictions.iter().all(|p| p.likeliest.is_none() && p.probabilities.is_empty()));
    }
    let mut table = csv::Reader::from_path(place.path("runs/dogs/predictions.csv")).unwrap();
    assert_eq!(table.headers().unwrap(), vec!["line", "input", "expected", "base", "tuned"]);
    let answers = |arm: usize, row: usize| result.arms[arm].answers.predictions[row].generated.clone();
    for (i, record) in table.records().enumerate() {
        let line = ["2", "3", "5"][i].to_owned();
        let (input, expected) = (rows[i].0.to_owned(), rows[i].1.to_owned());
        let expected = [line, input, expected, answers(0, i), answers(1, i)];
        assert_eq!(record.unwrap().iter().collect::<Vec<_>>(), expected);
    }
    let (stdout, _) = texts(&place.gneiss(eval.filter(|arg| *arg != "--json")).success());
    for part in [
        "exact match", "token F1", "ROUGE-L", "perplexity", "base, exact match: ", "sign test p = ",
        "rows better, ",
    ] {
        assert!(stdout.contains(part), "expected {part:?} in: {stdout}");
    }
    assert!(!stdout.contains("label"), "{stdout}");
}

/// Perplexity and the labels' probabilities, from each text alone. One label begins as the other ends, so that each
/// has to have its end counted.
#[test]
fn eval_scores_are_those_of_each_text_alone() {
    let place = Place::new();
    place.gneiss(["tune", "dogs.toml"]).success();
    let rows = [("shiny word40", "dog"), ("rude word41 late", "dog happy"), ("gentle", "dog happy")];
    let text = |(input, output): &(&str, &str)| format!("{input},{output}\n");
    place.write("labels.csv", &format!("input,output\n{}", rows.iter().map(text).collect::<String>()));
    let set = ["data.test=labels.csv", "data.train=labels.csv", "data.max_output_tokens=3"];
    let eval = ["eval", "dogs.toml", "--adapter", "runs/dogs", "--json", "--set", set[0], "--set", set[1]];
    let (stdout, _) = texts(&place.gneiss(eval.into_iter().chain(["--set", set[2]])).success());
    let result: Evaluation = serde_json::from_str(&stdout).unwrap();
    assert_eq!(result.labels, ["dog", "dog happy"]);

    let mut config = Config::load(&place.path("dogs.toml"), &[]).unwrap();
    config.model.id = place.path("model").display().to_string();
    let session = gneiss::session::open(&config.model, &mut |_, _| ()).unwrap();
    let words = |text: &str| session.tokenizer.encode(text, false).unwrap();
    let prompt = Adapter::read(&place.path("runs/dogs/adapter")).unwrap().prompt.values().clone();
    let none = prompt.narrow(0, 0, 0).unwrap();
    let loss = |prompt: &Tensor, before: &str, input: &str, output: &str| -> Vec<f64> {
        let input = words(&format!("{before}say {input} :"));
        let target = [words(output), vec![session.tokenizer.eos_token_id]].concat();
        let example = gneiss::batch::Example { input, target, line: 0 };
        let groups = [gneiss::batch::PrefixGroup::new(0..prompt.dims()[0] as u32, [&example])];
        gneiss::tune::evaluate(&session.model, &Prefix::Embeddings(prompt.clone()), &groups, usize::MAX)
            .unwrap()
            .nll()
            .unwrap()
    };
    for (arm, (prompt, before)) in result.arms.iter().zip([(&none, "say 1 or 0 "), (&prompt, "")]) {
        let all: Vec<f64> =
            rows.iter().flat_map(|(input, output)| loss(prompt, before, input, output)).collect();
        assert_eq!(all.len(), 2 + 3 + 3);
        let mean = all.iter().sum::<f64>() / all.len() as f64;
        let Answers { loss: found, perplexity, predictions, .. } = &arm.answers;
        assert!((found - mean).abs() < 1e-5, "{}: {found}, expected {mean}", arm.name);
        assert!((perplexity / mean.exp() - 1.0).abs() < 1e-5, "{}", arm.name);
        for (row, prediction) in rows.iter().zip(predictions) {
            let label = |label: &str| (-loss(prompt, before, row.0, label).iter().sum::<f64>()).exp();
            let (short, long) = (label("dog"), label("dog happy"));
            let expected = [short / (short + long), long / (short + long)];
            for (p, expected) in prediction.probabilities.iter().zip(expected) {
                assert!((p - expected).abs() < 1e-5, "{}: {prediction:?}, {expected}", arm.name);
            }
        }
    }
}

#[test]
fn eval_keeps_what_came_before_an_error() {
    let place = Place::new();
    place.gneiss(["tune", "dogs.toml"]).success();
    let mut adapter = Adapter::read(&place.path("runs/dogs/adapter")).unwrap();
    adapter.prompt = Prefix::Embeddings((adapter.prompt.values().ones_like().unwrap() * 3e38).unwrap());
    adapter.write(&place.path("wild"), &Default::default()).unwrap();
    let eval = ["eval", "dogs.toml", "--adapter", "runs/dogs", "--adapter", "wild", "--out", "out"];
    let (stdout, stderr) = texts(&place.gneiss(eval).code(1));
    assert_eq!(stdout, "");
    for part in
        ["out/evaluation.json and out/predictions.csv, of base, dogs alone", "error: evaluating wild: "]
    {
        assert!(stderr.contains(part), "expected {part:?} in: {stderr}");
    }
    let kept = std::fs::read_to_string(place.path("out/evaluation.json")).unwrap();
    let kept: Evaluation = serde_json::from_str(&kept).unwrap();
    assert_eq!((kept.arms.len(), kept.pairs.len(), kept.arms[1].name.as_str()), (2, 2, "dogs"));

    // Alone, it leaves nothing, and an earlier result where it was.
    let before = place.files("out");
    place.gneiss(["eval", "dogs.toml", "--adapter", "wild", "--out", "out"]).code(1);
    assert_eq!(place.files("out"), before);
}

#[test]
fn eval_refuses_before_it_computes() {
    let place = Place::new();
    place.gneiss(["tune", "dogs.toml"]).success();
    let eval = |more: &[&'static str]| {
        ["eval", "dogs.toml", "--adapter", "runs/dogs"].into_iter().chain(more.to_vec())
    };
    place.refuses(eval(&["--adapter", "runs/dogs/adapter"]), &["runs/dogs/adapter", "once", "same"]);
    place.refuses(eval(&["--adapter", "nowhere"]), &["nowhere", "adapter folder"]);
    place.refuses(eval(&["--adapter", "runs"]), &["runs", "adapter_config.json"]);
    place.refuses(eval(&["--set", "data.test="]), &["data.test", "none"]);
    place.refuses(eval(&["--set", "data.test=no.csv"]), &["no.csv", "o such file"]);
    // Words that the checkpoint's tokenizer doesn't know are one token.
    place.write("unknown.csv", "input,output\nshiny,yes\nrude,no\n");
    let sets = ["--set", "data.test=unknown.csv", "--set", "data.train=unknown.csv"];
    place.refuses(eval(&sets), &["\"no\" and \"yes\"", "the same"]);
    place.gneiss(eval(&["--out", "test.csv"])).code(1);
    std::fs::rename(place.path("runs/dogs/adapter"), place.path("base")).unwrap();
    place.refuses(eval(&[]), &["runs/dogs", "adapter/"]);
    assert!(place.files("runs").keys().all(|name| !name.ends_with("evaluation.json")));

    // Its name is another than the base's.
    let eval = ["eval", "dogs.toml", "--adapter", "base", "--json"];
    let (stdout, _) = texts(&place.gneiss(eval).success());
    let result: Evaluation = serde_json::from_str(&stdout).unwrap();
    assert!(result.arms[1].name.ends_with("/base"), "{}", result.arms[1].name);
    assert!(place.path("runs/dogs.eval/evaluation.json").is_file());
}

/// Prompts of several seeds answer together, beside their mean and the best of them.
#[test]
fn an_ensemble_is_reported_beside_its_prompts() {
    let place = Place::new();
    place.gneiss(["tune", "dogs.toml", "--seeds", "3", "--set", "train.num_epochs=20"]).success();
    let adapters = ["001", "002", "003"].map(|trial| format!("runs/dogs/trials/{trial}"));
    let mut eval = vec!["eval", "dogs.toml", "--ensemble"];
    eval.extend(adapters.iter().flat_map(|adapter| ["--adapter", adapter.as_str()]));
    let (stdout, _) = texts(&place.gneiss(eval.clone()).success());
    for part in [
        "3 prompts, label likelihood", "most votes", "mean likelihood", "mean of single prompts",
        "best single prompt here, 00",
    ] {
        assert!(stdout.contains(part), "expected {part:?} in: {stdout}");
    }
    let kept: Evaluation = serde_json::from_value(place.json("runs/dogs.eval/evaluation.json")).unwrap();
    let ensemble = kept.ensemble.unwrap();
    let singles: Vec<f64> =
        kept.arms[1..].iter().map(|arm| arm.answers.likelihood.as_ref().unwrap().accuracy).collect();
    assert!((ensemble.mean_accuracy - singles.iter().sum::<f64>() / 3.0).abs() < 1e-12);
    assert_eq!(ensemble.best_accuracy, singles.iter().copied().fold(0.0, f64::max));
    assert_eq!((ensemble.vote.total, ensemble.names.len()), (6, 3));
    place.refuses(
        ["eval", "dogs.toml", "--ensemble", "--adapter", "runs/dogs/best"],
        &["--ensemble", "two adapters or more"],
    );
    eval.extend(["--set", "data.task=generation"]);
    place.refuses(eval, &["--ensemble", "classification"]);
}
