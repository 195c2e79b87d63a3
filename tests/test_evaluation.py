"""One pass over the data: what the report says is what the metrics say of the same predictions."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from calibclip import (
    PGD,
    DirichletHead,
    WorstCase,
    aleatoric_uncertainty,
    evaluate,
    metrics,
)
from calibclip._tables import STYLES, Table
from calibclip.report import Report

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.rand(50, 2, 3, 3, generator=GENERATOR)
LABELS = torch.randint(4, (50,), generator=GENERATOR)
SIZES = (20, 1, 29)


class Classifier(nn.Module):
    def __init__(self, n_classes=4):
        super().__init__()
        self.linear = nn.Linear(18, n_classes)
        self.dropout = nn.Dropout(0.5)
        self.linear.weight.data = 3 * torch.randn(n_classes, 18, generator=GENERATOR)
        self.calls = 0

    def forward(self, images):
        self.calls += 1
        return self.dropout(self.linear(images.flatten(1)))


def loader(images=IMAGES, labels=LABELS):
    return list(zip(images.split(SIZES), labels.split(SIZES), strict=True))


ATTACKS = {"pgd": PGD(0.05, 3), "worst": WorstCase([PGD(0.02, 2), PGD(0.1, 2)])}
HEAD = DirichletHead(temperature=1.0, logit_scale=5.0)


@pytest.fixture(scope="module")
def model():
    return Classifier()


@pytest.fixture(scope="module")
def report(model):
    return evaluate(model, loader(), ATTACKS, HEAD, progress=False)


def attacked(model, name):
    """The images of an attack, batch by batch as the loader has them."""
    if name == "clean":
        return IMAGES
    return torch.cat([ATTACKS[name](model, *batch).images for batch in loader()])


@pytest.mark.parametrize("name", ["clean", "pgd", "worst"])
def test_measures_are_those_of_the_metrics(model, report, name):
    with torch.no_grad():
        logits = model.eval()(attacked(model, name))
    model.train()
    given = {"logits": logits, "target": LABELS}
    condition, measures = report.conditions[name], report.metrics[name]
    right = logits.argmax(1) == LABELS
    doubt, _ = metrics.failure_scores(**given)
    expected = {
        "accuracy": metrics.accuracy(**given),
        "confidence": metrics.sharpness(**given).confidence,
        "nll": metrics.negative_log_likelihood(**given),
        "brier": metrics.brier_score(**given),
        "ece": metrics.expected_calibration_error(**given),
        "over_confidence": metrics.signed_calibration_error(**given).over_confidence,
        "under_confidence": metrics.signed_calibration_error(**given).under_confidence,
        "rms_ce": metrics.expected_calibration_error(**given, norm=2),
        "smooth_ece": metrics.smooth_calibration_error(**given),
        "classwise_ece": metrics.classwise_calibration_error(**given),
        "failure_auroc": metrics.failure_auroc(doubt, right),
        "failure_fpr95": metrics.failure_fpr95(doubt, right),
        "aurc": metrics.aurc(doubt, right),
        "augrc": metrics.augrc(doubt, right),
    }
    assert list(measures) == list(expected)
    assert measures == pytest.approx(expected, abs=1e-6)
    assert condition.correct.tolist() == right.tolist()
    au = aleatoric_uncertainty(HEAD(logits))
    np.testing.assert_allclose(condition.uncertainties["AU"], au, rtol=1e-5)
    np.testing.assert_allclose(condition.uncertainties["msp"], doubt, rtol=1e-4, atol=1e-5)
    assert list(condition.uncertainties) == ["msp", "entropy", "AU", "EU", "MI", "TU"]
    with pytest.raises(ValueError, match="read-only"):
        condition.uncertainties["AU"][0] = 0.0


def test_what_an_attack_does(report):
    clean, pgd = report.conditions["clean"], report.conditions["pgd"]
    found = report.under_attack["pgd"]
    assert found.flipped == float((clean.correct & ~pgd.correct).mean())
    a, b = clean.correct.mean(), pgd.correct.mean()
    assert found.harmonic_mean_accuracy == pytest.approx(2 * a * b / (a + b))
    change = report.metrics["pgd"]["ece"] - report.metrics["clean"]["ece"]
    assert found.calibration.ece_difference.estimate == pytest.approx(change, abs=1e-9)
    assert found.calibration.ece_difference.lower <= change
    for name, shift in found.shifts.items():
        before, after = clean.uncertainties[name], pgd.uncertainties[name]
        assert shift.rise == pytest.approx((after > before).mean())
        assert found.detection_auroc[name] == pytest.approx(
            np.mean((after[:, None] > before) + 0.5 * (after[:, None] == before))
        )
        threshold = np.sort(before)[math.ceil(0.95 * 50) - 1]
        accepted = (after <= threshold) & ~pgd.correct
        assert found.accepted_and_wrong[name] == pytest.approx(accepted.mean())
    wrong = ~pgd.correct
    assert found.overconfidence.rate[0.9] == pytest.approx((wrong & (pgd.confidence > 0.9)).mean())
    assert set(report.under_attack) == {"pgd", "worst"}


def test_the_model_is_borrowed_in_eval_mode(model, report):
    assert model.training
    assert model.dropout.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    # The same again: nothing was left to chance by the dropout.
    again = evaluate(model, loader(), ATTACKS, HEAD, progress=False)
    assert again.metrics == report.metrics


def test_defaults():
    model = Classifier()
    report = evaluate(model, loader(), progress=False)
    assert list(report.conditions) == ["clean"]
    assert list(report.conditions["clean"].uncertainties) == ["msp", "entropy"]
    assert report.under_attack == {}
    assert report.options["head"] is None
    model.logit_scale = 20.0
    report = evaluate(model, loader(), progress=False)
    assert report.options["head"] == "DirichletHead(temperature=0.07, logit_scale=20)"
    plain = evaluate(lambda images: images.flatten(1)[:, :4], loader(), progress=False)
    assert plain.n_samples == 50


def test_autocast_and_no_grad_around_it(model, report):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        again = evaluate(model, loader(), {"pgd": ATTACKS["pgd"]}, HEAD, progress=False)
    assert again.metrics["clean"] == report.metrics["clean"]
    assert again.metrics["pgd"] == report.metrics["pgd"]


def test_any_attack_finds_the_model_in_eval_mode_and_gradients_on(model):
    seen = []

    def spy(model, images, labels):
        images.requires_grad_()
        model(images).sum().backward()
        seen.append((model.training, torch.is_autocast_enabled("cpu")))
        return images

    with torch.no_grad():
        evaluate(model, loader(), {"spy": spy}, progress=False)
    assert seen == [(False, False)] * 3
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_empty_batch_and_a_stream_without_a_length():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from zip(IMAGES, LABELS, strict=True)

    model = Classifier()
    streamed = evaluate(
        model, torch.utils.data.DataLoader(Stream(), batch_size=20), None, HEAD, progress=False
    )
    with_empty = [(IMAGES[:0], LABELS[:0]), *loader()]
    found = evaluate(model, with_empty, {"pgd": ATTACKS["pgd"]}, HEAD, progress=False)
    assert found.metrics["clean"] == pytest.approx(streamed.metrics["clean"], abs=1e-6)


def test_certainty_beyond_all_numbers_does_not_hide_the_rest():
    def classify(images):
        logits = images.flatten(1)[:, :4].clone()
        logits[:2, 1:] = -torch.inf  # one class left
        return logits

    report = evaluate(classify, loader(), {"same": lambda m, x, y: x}, progress=False)
    assert math.isnan(report.under_attack["same"].shifts["msp"].rise)
    assert report.under_attack["same"].shifts["entropy"].tie == 1.0
    assert "msp" in str(report)
    json.loads(report.to_json())


@pytest.mark.parametrize("scale", [20, np.float32(20)])
def test_any_number_is_a_logit_scale(scale):
    model = Classifier()
    model.logit_scale = scale
    assert "AU" in evaluate(model, loader(), progress=False).conditions["clean"].uncertainties


# ---------------------------------------------------------------------------- showing it


@pytest.mark.parametrize("style", STYLES)
def test_tables(report, style):
    text = report.table(style)
    accuracy = f"{report.metrics['pgd']['accuracy']:.4f}"
    assert accuracy in text
    assert "Under attack" in text
    for name in ("clean", "pgd", "worst", "entropy", "harmonic mean of accuracies"):
        assert name in text
    if style == "text":
        assert text == str(report)
        assert max(map(len, text.splitlines())) < 100
    if style == "markdown":
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in rows[:20]}) == 1
    if style == "latex":
        assert text.count("\\begin{tabular}") == text.count("\\end{tabular}") == 3
        assert "95 \\% TPR" in text
    with pytest.raises(ValueError, match="style: expected one of 'text', 'markdown', 'latex'"):
        report.table("csv")


def test_table_cells_are_escaped():
    table = Table("50 % & more", ("", "a|b"), (("<x>",), ("a_b & c", "1 %")))
    assert table.render("markdown").splitlines() == [
        "**50 % & more**",
        "",
        "|  | a\\|b |",
        "| --- | ---: |",
        "| **<x>** |  |",
        "| a_b & c | 1 % |",
    ]
    assert "a\\_b \\& c & 1 \\% \\\\" in table.render("latex")
    assert "<td>1 %</td>" in table.html()
    assert "&lt;x&gt;" in table.html()
    assert table.render("text").splitlines() == [
        "50 % & more",
        "         a|b",
        "--------------",
        "",
        "<x>",
        "a_b & c  1 %",
    ]


def test_json(report, tmp_path):
    text = report.to_json(tmp_path / "report.json")
    found = json.loads((tmp_path / "report.json").read_text())
    assert json.loads(text) == found
    assert found["metrics"]["pgd"]["ece"] == pytest.approx(report.metrics["pgd"]["ece"])
    shift = found["under_attack"]["worst"]["shifts"]["AU"]
    assert shift["count"] == 50
    assert set(shift["subsets"]) >= {"all", "flipped", "survived"}
    assert found["options"]["attacks"]["pgd"] == repr(ATTACKS["pgd"])
    assert "NaN" not in text
    assert found["n_samples"] == 50


def test_pandas_samples_and_html(report):
    pandas = pytest.importorskip("pandas")
    frame = report.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.loc["pgd", "accuracy"] == report.metrics["pgd"]["accuracy"]
    samples = report.samples()["pgd"]
    assert len(pandas.DataFrame(samples)) == 50
    html = report._repr_html_()
    assert html.count("<table") == html.count("</table>") == 3
    assert "PGD(eps=0.05" in html
    assert repr(report).startswith("Report(50 images, accuracy: clean ")


def test_figure(report, tmp_path):
    pytest.importorskip("matplotlib")
    figure = report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["clean", "pgd", "worst", "msp", "entropy", "AU", "EU", "MI", "TU",
                      "accepted by msp"]  # fmt: skip
    assert figure._repr_png_().startswith(b"\x89PNG")
    labels = [text.get_text() for text in figure.axes[3].get_legend().get_texts()]
    assert labels == ["clean", "pgd", "worst"]


# ---------------------------------------------------------------------------- resuming


class Stops:
    """A loader that fails at a batch."""

    def __init__(self, at):
        self.at = at

    def __iter__(self):
        for position, batch in enumerate(loader()):
            if position == self.at:
                raise RuntimeError("the power went off")
            yield batch


def test_a_run_goes_on_where_it_was_cut_off(report, model, tmp_path):
    path = tmp_path / "deep" / "state.pt"
    options = {"progress": False, "checkpoint": path, "checkpoint_seconds": 0.0}
    with pytest.raises(RuntimeError, match="the power went off"):
        evaluate(model, Stops(2), ATTACKS, HEAD, **options)
    before = model.calls
    resumed = evaluate(model, loader(), ATTACKS, HEAD, **options)
    assert resumed.metrics == report.metrics
    assert str(resumed.under_attack) == str(report.under_attack)
    resumed_calls = model.calls - before
    before = model.calls
    evaluate(model, loader()[2:], ATTACKS, HEAD, progress=False)
    # The last batch, and the first once to know the model.
    assert resumed_calls == model.calls - before + 1
    before = model.calls
    assert evaluate(model, loader(), ATTACKS, HEAD, **options).metrics == report.metrics
    assert model.calls == before + 1


def test_a_run_that_is_cut_off_while_it_writes_keeps_what_it_had(model, tmp_path, monkeypatch):
    path, save, count = tmp_path / "state.pt", torch.save, []

    def fails_later(state, file):
        count.append(1)
        file.write(b"half a fi")
        if len(count) == 2:
            raise OSError("the disk is full")
        file.seek(0)
        save(state, file)

    monkeypatch.setattr(torch, "save", fails_later)
    options = {"progress": False, "checkpoint": path, "checkpoint_seconds": 0.0}
    with pytest.raises(OSError, match="the disk is full"):
        evaluate(model, loader(), None, HEAD, **options)
    monkeypatch.undo()
    assert len(torch.load(path, weights_only=True)["digests"]) == 1
    assert evaluate(model, loader(), None, HEAD, **options).n_samples == 50


def test_a_checkpoint_knows_its_classifier(model, tmp_path):
    options = {"progress": False, "checkpoint": tmp_path / "state.pt"}
    evaluate(model, loader(), None, HEAD, **options)
    for other in (Classifier(), Classifier(5)):
        with pytest.raises(ValueError, match="classifier: expected the classifier of the checkp"):
            evaluate(other, loader(), None, HEAD, **options)


@pytest.mark.parametrize("content", [b"", b"text", "weights"])
def test_a_file_that_is_no_checkpoint(content, model, tmp_path):
    path = tmp_path / "state.pt"
    if content == "weights":
        torch.save(model.state_dict(), path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="checkpoint: expected a file that evaluate wrote, got"):
        evaluate(model, loader(), progress=False, checkpoint=path)


def test_functions_and_half_precision_can_be_resumed(tmp_path):
    options = {"progress": False, "checkpoint": tmp_path / "state.pt"}
    batches = [(images.bfloat16(), labels) for images, labels in loader()]

    def classify(images):
        return images.float().flatten(1)[:, :4]

    for _ in range(2):
        attacks = {"noise": lambda model, images, labels: images.clone()}
        report = evaluate(classify, batches, attacks, **options)
        assert "0x" not in report.options["attacks"]["noise"]


def test_a_checkpoint_of_something_else(model, tmp_path):
    path = tmp_path / "state.pt"
    options = {"progress": False, "checkpoint": path}
    evaluate(model, loader(), {"pgd": PGD(0.05, 3)}, HEAD, **options)
    with pytest.raises(ValueError, match=r"checkpoint: .* got one with another attacks; delete it"):
        evaluate(model, loader(), {"pgd": PGD(0.06, 3)}, HEAD, **options)
    with pytest.raises(ValueError, match=r"checkpoint: .* another head, n_bins"):
        evaluate(model, loader(), {"pgd": PGD(0.05, 3)}, None, n_bins=9, **options)
    with pytest.raises(ValueError, match=r"loader: expected batch 1 as in .*; use shuffle=False"):
        evaluate(model, loader(IMAGES.flip(0)), {"pgd": PGD(0.05, 3)}, HEAD, **options)
    changed = LABELS.clone()
    changed[20] = (changed[20] + 1) % 4
    with pytest.raises(ValueError, match="loader: expected batch 2 as in"):
        evaluate(model, loader(labels=changed), {"pgd": PGD(0.05, 3)}, HEAD, **options)
    with pytest.raises(ValueError, match=r"loader: expected the 3 batches of .*, got 2"):
        evaluate(model, loader()[:2], {"pgd": PGD(0.05, 3)}, HEAD, **options)


# ---------------------------------------------------------------------------- several labels


def test_multilabel(tmp_path):
    model = Classifier(6)
    target = torch.randint(2, (50, 6), generator=torch.Generator().manual_seed(1))
    attacks = {"bce": PGD(0.1, 3, objective="bce")}
    path = tmp_path / "state.pt"
    options = {"multilabel": True, "top_k": 2, "progress": False, "checkpoint": path}
    report = evaluate(model, loader(labels=target), attacks, **options)
    model.eval()
    adversarial = torch.cat(
        [attacks["bce"](model, *batch).images for batch in loader(labels=target)]
    )
    for name, images in (("clean", IMAGES), ("bce", adversarial)):
        with torch.no_grad():
            scores = model(images)
        mean = metrics.mean_average_precision(scores, target).mean
        top = metrics.multilabel_precision_recall_f1(scores, target, k=2)
        found = report.metrics[name]
        assert found["mean_average_precision"] == pytest.approx(mean, abs=1e-6)
        assert found["class_f1"] == pytest.approx(top.class_f1, abs=1e-6)
        assert found["overall_recall"] == pytest.approx(top.overall_recall, abs=1e-6)
    assert report.under_attack == {}
    assert "mAP" in str(report)
    assert "OF1 @ 2" in report.table("markdown")
    assert repr(report).startswith("Report(50 images, mean average precision: clean")
    json.loads(report.to_json())
    with pytest.raises(ValueError, match="report: expected one label an image, got several"):
        report.plot()
    again = evaluate(model, loader(labels=target), attacks, **options)
    assert again.metrics == report.metrics


# ---------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"classifier": 3}, TypeError, "classifier: expected a callable from images to logits"),
        ({"loader": 3}, TypeError, r"loader: expected an iterable of \(images, target\), got int"),
        ({"loader": []}, ValueError, "loader: expected at least one image, got none"),
        ({"loader": [(IMAGES, [0])]}, TypeError, r"loader: .*, got Tensor and list"),
        ({"attacks": [PGD(0.1)]}, TypeError, r"attacks: expected a mapping .*; pass \{\"pgd\""),
        ({"attacks": {"pgd": 3}}, TypeError, "attacks: expected a mapping .*, got 'pgd': int"),
        ({"attacks": {"clean": PGD(0.1)}}, ValueError, "attacks: expected names other than"),
        ({"attacks": {"odd": lambda m, x, y: x[:1]}}, ValueError, "attack: expected images of"),
        ({"head": 3}, TypeError, "head: expected a callable from logits to log_alpha, got int"),
        ({"n_bins": 0}, ValueError, "n_bins: expected an integer >= 1, got 0"),
        ({"top_k": 0}, ValueError, "top_k: expected an integer >= 1, got 0"),
        ({"multilabel": 1}, TypeError, "multilabel: expected True or False"),
        ({"checkpoint_seconds": -1}, ValueError, "checkpoint_seconds: expected a number >= 0"),
        ({"progress": "yes"}, TypeError, "progress: expected True or False, got str 'yes'"),
        ({"loader": [(IMAGES, LABELS + 4)]}, ValueError, "target: expected class indices in"),
        ({"head": lambda z: z[:3]}, ValueError, r"head: expected log_alpha .*\(20, 4\), got"),
        ({"classifier": lambda x: [x]}, TypeError, r"classifier: expected logits of .* = 20, got"),
        ({"classifier": lambda x: x}, ValueError, r"classifier: .*, got float32 tensor of shape"),
        ({"classifier": lambda x: x.flatten(1)[:, :4] / 0}, ValueError,
         "classifier: expected finite logits, got 20 of 20 rows .* on 'clean' images"),
    ],
)  # fmt: skip
def test_bad_arguments(changes, error, message):
    arguments = {
        "classifier": lambda images: images.flatten(1)[:, :4],
        "loader": loader(),
        "attacks": {"odd": lambda model, images, target: images},
        "head": None,
        "progress": False,
    }
    with pytest.raises(error, match=message):
        evaluate(**{**arguments, **changes})


def test_no_loader_of_known_length_is_needed(report, model):
    found = evaluate(model, iter(loader()), ATTACKS, HEAD, progress=True)
    assert isinstance(found, Report)
    assert found.metrics == report.metrics
