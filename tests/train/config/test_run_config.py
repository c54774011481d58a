from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from mulki import methods
from mulki.clip.models import BUNDLED
from mulki.data.csv_files import CsvForm
from mulki.errors import InputError
from mulki.train.config import presets
from mulki.train.config.run_config import (
    RunConfig,
    csv_form,
    read_config,
    resolve,
    unknown_option,
)


def resolved(**given: Any) -> Any:
    """Of a model without a preset."""
    return resolve({"tasks": ["a_folder"], "model": "RN50", **given})


# --- where a value comes from


def test_defaults_without_a_preset() -> None:
    settings = resolved()
    assert settings.run == RunConfig(tasks=("a_folder",), model="RN50")
    assert settings.method == methods.get("mulki").Options()


def test_preset_of_the_bundled_model_is_weaker_than_what_is_given() -> None:
    preset = presets.MODELS[BUNDLED]
    settings = resolve({})
    assert settings.run.tasks == ("embedded",)
    assert settings.run.iterations == preset["iterations"] != RunConfig.iterations
    assert resolve({"iterations": 7}).run.iterations == 7
    assert resolve({"lock_text": False}).run.lock_text is False
    assert resolve({"model": "RN50"}).run.iterations == RunConfig.iterations


def test_epochs_leave_the_preset_iterations_behind() -> None:
    settings = resolve({"epochs": 2})
    assert settings.run.epochs == 2.0
    assert "iterations" not in settings.to_dict()


@pytest.mark.parametrize("name", methods.available())
@pytest.mark.parametrize("length", [{"iterations": 3}, {"epochs": 1.5}])
def test_resolved_configuration_is_a_configuration(
    tmp_path: Path, name: str, length: dict[str, Any]
) -> None:
    settings = resolve({"method": name, "seed": 4, "grad_clip_norm": 1.0, **length})
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(settings.to_dict()))
    again = resolve(read_config(tmp_path / "args.yaml"))
    assert again.to_dict() == settings.to_dict()
    assert again.method == settings.method


def test_no_option_of_a_method_hides_one_of_the_run() -> None:
    of_run = {f.name for f in fields(RunConfig)}
    for method in methods.available().values():
        assert not of_run & {f.name for f in fields(method.Options)}


# --- what is refused


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"method": "mulkii"}, 'method.*mulkii.*did you mean "mulki"'),
        ({"learning_rate": 1}, "--learning-rate: no such option"),
        ({"btach_size": 1}, '--btach-size: no such option.*did you mean "batch-size"'),
        ({"method": "finetune", "alpha": 0.5}, "--alpha: method finetune has.*belongs to mulki"),
        (
            {"method": "zero_shot", "temperature": 1},
            "--temperature: .*belongs to lwf, lwf_vr",
        ),
        ({"lr": "fast"}, "--lr: got 'fast', wanted a number"),
        ({"lr": 0}, "--lr: got 0.0, wanted a number above 0"),
        ({"lr": "nan"}, "--lr: got"),
        ({"lr": [1]}, "--lr: got"),
        ({"lr": None}, "--lr: got None"),
        ({"iterations": 0}, "--iterations: got 0, wanted a number at least 1"),
        ({"iterations": 2.5}, "--iterations: got 2.5, wanted a whole number"),
        ({"epochs": 0}, "--epochs: got 0"),
        ({"iterations": 5, "epochs": 1}, "--iterations and --epochs: got both"),
        ({"batch_size": 0}, "--batch-size: got 0"),
        ({"seed": -1}, "--seed: got -1"),
        ({"seed": 2**70}, "--seed: got"),
        ({"beta1": 1}, "--beta1: got 1.0, wanted a number below 1"),
        ({"beta2": 1.5}, "--beta2: got 1.5"),
        ({"eps": 0}, "--eps: got 0"),
        ({"workers": -1}, "--workers: got -1"),
        ({"deterministic": True, "micro_batch": "auto"}, "--micro-batch auto: .*pass a number"),
        ({"process_timeout": 0}, "--process-timeout: got 0"),
        ({"precision": "fp8"}, "--precision: got 'fp8'.*wanted one of.*amp_bf16"),
        ({"lr_scheduler": "cosin"}, '--lr-scheduler: .*did you mean "cosine"'),
        ({"augment": "crop+flop"}, "--augment: got 'flop'"),
        ({"lock_text": "perhaps"}, "--lock-text: got 'perhaps', wanted true or false"),
        ({"tasks": 3}, "--tasks: got 3"),
        ({"tasks": ["a", 3]}, "--tasks: got"),
        ({"alpha": 0}, "--alpha: got 0.0, wanted a number above 0"),
        ({"micro_batch": 0}, "--micro-batch: got '0', wanted a whole number from 1, or auto"),
        ({"micro_batch": "some"}, "--micro-batch: got 'some'"),
        ({"micro_batch": 9, "batch_size": 8}, "--micro-batch: got 9, wanted at most .*8"),
        ({"protocol": "zslc"}, '--protocol: .*did you mean "zscl"'),
        ({"shots": 0}, "--shots: got 0"),
        ({"scenario": "cil"}, "--scenario cil: got no --increments"),
        ({"increments": 10}, "--increments: got 10, which belongs to the scenario cil"),
        ({"base_classes": 10}, "--base-classes: got 10, which belongs to the scenario cil"),
        ({"label_space": "some"}, "--label-space: got 'some', wanted one of task, seen, all"),
        ({"opt": "muonn"}, '--opt: .*did you mean "muon"'),
        ({"lr_of": ["mnist"]}, "--lr-of: got 'mnist', wanted NAME=RATE"),
        ({"gate": "lable"}, '--gate: .*did you mean "label"'),
    ],
)
def test_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as info:
        resolve(given)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("given", [None, 3, "3", "8", "auto"])
def test_micro_batches(given: Any) -> None:
    config = resolve({"batch_size": 8, "micro_batch": given}).run
    assert config.micro_batch == (None if given is None else str(given))


@pytest.mark.parametrize("options", [RunConfig, *(m.Options for m in methods.available().values())])
def test_every_default_is_within_its_bounds(options: type) -> None:
    from mulki.choices.options import check_options

    check_options(options())


def test_hyphens_are_shown_and_underscores_meant() -> None:
    assert "--save-chekpoints" in str(unknown_option("save_chekpoints", "mulki"))
    assert 'did you mean "save-checkpoints"' in str(unknown_option("save_chekpoints", "mulki"))


# --- files


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def test_read(tmp_path: Path) -> None:
    path = write(tmp_path, "batch-size: 8\nlr: 1e-4\ntasks: [a, b]\nepochs: null\n")
    given = read_config(path)
    assert set(given) == {"batch_size", "lr", "tasks", "epochs"}
    config = resolve(given).run
    assert (config.batch_size, config.lr, config.tasks) == (8, 1e-4, ("a", "b"))


@pytest.mark.parametrize("text", ["", "# nothing\n"])
def test_empty_file(tmp_path: Path, text: str) -> None:
    assert read_config(write(tmp_path, text)) == {}


@pytest.mark.parametrize("text", ["- a\n- b\n", "words", "3: 4\n", "a: [1\n", "\tx: 1\n", "a: !!x"])
def test_not_a_configuration(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InputError, match=r"--config: .*c\.yaml") as info:
        read_config(path)
    assert "\n" not in str(info.value)


def test_unreadable_files(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.yaml", tmp_path):
        with pytest.raises(InputError, match="--config"):
            read_config(path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(InputError, match=r"--config: .*binary\.yaml"):
        read_config(tmp_path / "binary.yaml")


def test_the_form_of_csv_files() -> None:
    given = {"csv_img_key": "filepath", "csv_caption_key": "title", "csv_separator": "tab"}
    assert csv_form(resolve(given).run) == CsvForm("filepath", "title", "\t")
    assert csv_form(resolve({"csv_separator": "\\t"}).run).separator == "\t"
    assert csv_form(RunConfig()) == CsvForm()
    for separator in ("", ", ", '"'):
        with pytest.raises(InputError, match="^--csv-separator: got"):
            resolve({"csv_separator": separator})
