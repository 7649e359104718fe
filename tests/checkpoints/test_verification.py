"""`verify_checkpoint`: each claim that does not hold is found, also where all sums were made to hold again."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from condzoo import verify_checkpoint
from condzoo.checkpoints import verify_released
from condzoo.checkpoints.folder import read_folder, write_sums
from condzoo.checkpoints.model_card import model_card
from condzoo.checkpoints.remeasuring import count_correct, fixed_input, initial_network
from condzoo.cli import main
from condzoo.data import BatchPlan, load_data
from condzoo.models import create_model, released
from condzoo.models.weight_files import sha256
from condzoo.release import release
from condzoo.training import train
from tests.checkpoints.conftest import RECIPE, claim_clean_source


def rows(verification):
    return {row.check: row for row in verification.rows}


def failed(verification):
    assert not verification.ok
    return [row.check for row in verification.rows if row.ok is False]


def edit_json(checkpoint, name, change):
    record = json.loads((checkpoint / name).read_text())
    change(record)
    (checkpoint / name).write_text(json.dumps(record))


def resum(checkpoint):
    """New sums, a new weights' hash in metrics.json and a new card: every file agrees with every other."""
    digest = sha256((checkpoint / "model.safetensors").read_bytes())
    edit_json(checkpoint, "metrics.json", lambda metrics: metrics.update(sha256=digest))
    write_sums(checkpoint)
    (checkpoint / "README.md").write_text(model_card(read_folder(checkpoint)))
    write_sums(checkpoint)


def test_everything_a_fresh_release_claims_holds(checkpoint):
    verification = verify_checkpoint(checkpoint)
    assert verification.ok
    checks = {name: row.ok for name, row in rows(verification).items()}
    every = ("files", "index", "logits", "model card", "accuracy", "conditioning")
    assert checks == dict.fromkeys(every, True) | {"index": None}
    assert "of 360 test images right, as recorded" in rows(verification)["accuracy"].detail


def test_a_network_trained_with_dropout_keeps_its_promise(tmp_path):
    """Its conditioning is of training mode, with the dropout that only the recipe knows of."""
    recipe = RECIPE.replace('"mlp4x24_bn"', '"cifar_resnet8"\ndrop_rate = 0.5')
    (tmp_path / "recipe.toml").write_text(recipe)
    path = train(tmp_path / "recipe.toml", out=tmp_path / "run", seed=1, device="cpu").path
    claim_clean_source(path)
    assert verify_checkpoint(release(path, "dropout", out=tmp_path / "out")).ok


def test_a_folder_is_known_by_its_name_from_inside_too(index, monkeypatch):
    monkeypatch.chdir(released.cache_folder() / "mlp4x24_bn.digits")
    for path in (".", Path("model.safetensors")):
        verification = verify_checkpoint(path)
        assert verification.name == "mlp4x24_bn.digits"
        assert rows(verification)["index"].ok is True


def test_a_released_name_is_held_against_the_index(index):
    verification = verify_checkpoint("mlp4x24_bn")
    assert verification.ok
    assert verification.name == "mlp4x24_bn.digits"
    assert rows(verification)["index"].ok is True


def test_weights_with_sums_of_their_own_fail_the_index(checkpoint, index):
    state = load_file(checkpoint / "model.safetensors")
    state["fc.bias"] += 0.5
    save_file(state, checkpoint / "model.safetensors")
    resum(checkpoint)
    assert {"index", "logits"} <= set(failed(verify_checkpoint(checkpoint)))


def test_changed_weights_fail_logits_and_conditioning(checkpoint):
    state = load_file(checkpoint / "model.safetensors")
    state["layers.0.linear.weight"] = state["layers.0.linear.weight"].flip(1)
    save_file(state, checkpoint / "model.safetensors")
    resum(checkpoint)
    assert {"logits", "accuracy", "conditioning"} <= set(failed(verify_checkpoint(checkpoint)))


def test_one_image_of_accuracy_is_found(checkpoint):
    edit_json(checkpoint, "metrics.json", lambda metrics: metrics.update(test_correct=metrics["test_correct"] + 1))
    resum(checkpoint)
    verification = verify_checkpoint(checkpoint)
    assert failed(verification) == ["accuracy"]
    assert "recorded" in rows(verification)["accuracy"].detail


def test_a_permille_of_conditioning_is_found(checkpoint):
    def raise_one(record):
        record["at_end"]["layers"]["fc"]["input"]["eigenvalues"][0] *= 1.002

    edit_json(checkpoint, "conditioning.json", raise_one)
    resum(checkpoint)
    verification = verify_checkpoint(checkpoint)
    assert failed(verification) == ["conditioning"]
    assert "at_end lambda_max within 2.0e-03 (fc)" in rows(verification)["conditioning"].detail


def smallest_input(record):
    """(eigenvalues of fc's input, the index of the smallest above the noise floor)."""
    spectrum = record["layers"]["fc"]["input"]
    above = [i for i, value in enumerate(spectrum["eigenvalues"]) if value > 100 * spectrum["noise_floor"]]
    return spectrum["eigenvalues"], above[-1]


@pytest.mark.parametrize("when", ["at_init", "at_end"])
def test_a_changed_small_eigenvalue_is_found(checkpoint, when):
    def change(record):
        values, i = smallest_input(record[when])
        assert i > 5
        values[i] *= 1.2

    edit_json(checkpoint, "conditioning.json", change)
    resum(checkpoint)
    verification = verify_checkpoint(checkpoint)
    assert failed(verification) == ["conditioning"]
    detail = rows(verification)["conditioning"].detail
    assert re.search(rf"{when} each eigenvalue within 1\.\d+e-01 \(fc\)", detail)


def test_another_number_of_eigenvalues_is_found(checkpoint):
    edit_json(checkpoint, "conditioning.json", lambda c: smallest_input(c["at_init"])[0].pop())
    resum(checkpoint)
    verification = verify_checkpoint(checkpoint)
    assert failed(verification) == ["files"]
    assert "of 'fc' it has (23, 10) inputs and outputs, the network (24, 10)" in rows(verification)["files"].detail


def test_what_a_notebook_has_set_is_no_fault_of_a_checkpoint(checkpoint):
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        verification = verify_checkpoint(checkpoint)
    assert verification.ok, verification.rows


def test_a_place_that_a_recipe_names_is_not_looked_at_unless_asked_for(checkpoint, tmp_path, monkeypatch):
    """A checkpoint may be anyone's, and so is what its recipe has as a data set."""
    recipe = (checkpoint / "recipe.toml").read_text()
    recipe = recipe.replace('name = "digits"', f'name = "hfds"\ndataset = "{tmp_path}"')
    (checkpoint / "recipe.toml").write_text(recipe)
    edit_json(checkpoint, "metrics.json", lambda metrics: metrics["data"].update(name="hfds"))
    resum(checkpoint)
    asked = []
    monkeypatch.setattr("condzoo.data.sources.load_hub_data", lambda name, *rest: asked.append(name))
    checks = rows(verify_checkpoint(checkpoint))
    assert checks["accuracy"].ok is checks["conditioning"].ok is None
    assert "names a place of its own" in checks["accuracy"].detail
    assert asked == []
    verify_checkpoint(checkpoint, data_root=tmp_path)
    assert asked == [str(tmp_path)]


def test_verifying_all_goes_on_after_one_that_cannot_be_reached(index, monkeypatch, capsys):
    def unreachable(*arguments):
        raise ConnectionError("no route")

    monkeypatch.setattr(released, "download", unreachable)
    index.write_text('["mlp4x24.far"]\nsha256 = "0"\ndefault = true\n' + index.read_text())
    far, near = verify_released()
    assert (far.name, failed(far), near.name, near.ok) == ("mlp4x24.far", ["reached"], "mlp4x24_bn.digits", True)
    assert "the Hub did not give it: no route" in far.rows[0].detail
    with pytest.raises(SystemExit) as stop:
        main(["verify", "--all"])
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert "mlp4x24.far  FAIL  reached" in out
    assert "mlp4x24_bn.digits  ok    conditioning" in out


def test_changed_logits_are_found(checkpoint):
    edit_json(checkpoint, "expected.json", lambda expected: expected["logits"][0].__setitem__(3, 0.25))
    resum(checkpoint)
    assert failed(verify_checkpoint(checkpoint)) == ["logits"]


def test_logits_of_other_images_are_found(checkpoint):
    edit_json(checkpoint, "expected.json", lambda expected: expected.update(shape=[2, 1, 1024, 1024]))
    resum(checkpoint)
    verification = verify_checkpoint(checkpoint)
    assert failed(verification) == ["files"]
    assert "the size of an image: in config.json (1, 12, 12), in expected.json (1, 1024, 1024)" in str(verification)


def test_a_stale_card_is_found(checkpoint):
    with (checkpoint / "README.md").open("a") as card:
        card.write("and it is the best of all\n")
    write_sums(checkpoint)
    verification = verify_checkpoint(checkpoint)
    assert failed(verification) == ["model card"]


@pytest.mark.parametrize(("version", "known"), [("0.0.1", None), (None, False)])
def test_a_card_in_the_words_of_another_version_is_not_checked(checkpoint, version, known):
    edit_json(checkpoint, "metrics.json", lambda metrics: metrics["packages"].update(condzoo=version))
    with (checkpoint / "README.md").open("a") as card:
        card.write("In other words.\n")
    write_sums(checkpoint)
    row = rows(verify_checkpoint(checkpoint))["model card"]
    assert row.ok is known
    assert ("made by condzoo 0.0.1" in row.detail) == (known is None)


@pytest.mark.parametrize(
    ("field", "value", "also"), [("mean", [0.5], ["accuracy"]), ("std", [0.001], ["accuracy"]), ("crop_pct", 0.5, [])]
)
def test_images_prepared_otherwise_than_they_were_are_found(checkpoint, index, field, value, also):
    edit_json(checkpoint, "config.json", lambda config: config["pretrained_cfg"].update({field: value}))
    resum(checkpoint)
    verification = verify_checkpoint(checkpoint)
    assert failed(verification) == ["index", *also]
    assert f"config.json has {field} = " in rows(verification)["index"].detail


def test_a_damaged_file_is_the_only_row(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(b"")
    verification = verify_checkpoint(checkpoint)
    assert [row.ok for row in verification.rows] == [False]
    assert "is not as it was summed" in verification.rows[0].detail


def test_without_its_data_the_rest_is_checked(checkpoint, monkeypatch, tmp_path):
    text = (checkpoint / "recipe.toml").read_text().replace('name = "digits"', 'name = "mnist"')
    (checkpoint / "recipe.toml").write_text(text)
    edit_json(checkpoint, "metrics.json", lambda metrics: metrics["data"].update(name="mnist"))
    resum(checkpoint)
    monkeypatch.setenv("CONDZOO_DATA", str(tmp_path / "nothing"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "nothing"))
    checks = rows(verify_checkpoint(checkpoint))
    assert checks["accuracy"].ok is checks["conditioning"].ok is None
    assert checks["accuracy"].detail.startswith("not checked without its data")
    with pytest.raises(FileNotFoundError):
        verify_checkpoint(checkpoint, data_root=tmp_path / "nothing")


def test_what_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        verify_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no weights are released for"):
        verify_checkpoint("cifar_resnet1202")
    (tmp_path / "w.pt").touch()
    with pytest.raises(ValueError, match=r"w\.pt is a file; `condzoo convert \S+ --model NAME` makes"):
        verify_checkpoint(tmp_path / "w.pt")


def test_the_weights_stand_for_their_folder(checkpoint):
    assert verify_checkpoint(checkpoint / "model.safetensors").path == verify_checkpoint(checkpoint).path


def test_the_fixed_input_is_spread_evenly_with_mean_0_and_variance_1():
    x = fixed_input((2, 3, 32, 32))
    assert x.mean().abs() < 0.01
    assert x.var().item() == pytest.approx(1, abs=0.01)
    assert torch.equal(x.flatten()[:2], torch.tensor([-0.5 * 12**0.5, (2654435761 / 2**32 - 0.5) * 12**0.5]))


def first_input(record):
    return next(iter(record["layers"].values()))["input"]


SENSELESS = {
    "no data in metrics": ("metrics.json", lambda record: record["data"].clear()),
    "no images": ("metrics.json", lambda record: record.update(test_images=0)),
    "no layers": ("conditioning.json", lambda record: record["at_end"].update(layers={})),
    "a size of eigenvalues": ("conditioning.json", lambda record: first_input(record["at_end"]).update(eigenvalues={})),
}


@pytest.mark.parametrize("case", SENSELESS)
def test_records_that_make_no_sense_are_failed_rows(checkpoint, case):
    name, change = SENSELESS[case]
    edit_json(checkpoint, name, change)
    write_sums(checkpoint)
    assert failed(verify_checkpoint(checkpoint)) == ["files"]


def test_data_that_nobody_knows_is_a_failed_row(checkpoint):
    recipe = (checkpoint / "recipe.toml").read_text()
    (checkpoint / "recipe.toml").write_text(recipe.replace('name = "digits"', 'name = "letters"'))
    edit_json(checkpoint, "metrics.json", lambda metrics: metrics["data"].update(name="letters"))
    write_sums(checkpoint)
    assert "accuracy" in failed(verify_checkpoint(checkpoint))


def test_large_images_are_counted_a_few_at_a_time():
    """1,000 of 224 x 224 pixels would take a ResNet-50 tens of gigabytes."""
    sizes: dict[int, list[int]] = {28: [], 256: []}

    class Zeros(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            sizes[x.shape[-1]].append(len(x))
            return torch.nn.functional.one_hot(x.new_zeros(len(x), dtype=torch.long), 10).float()

    for side, seen in sizes.items():
        data = load_data("digits", resize=side)
        zeros = sum(int((y == 0).sum()) for _, y in data.ordered_batches("test", BatchPlan(50)))
        assert count_correct(Zeros(), data) == zeros
        assert sum(seen) == data.size("test") == 360
    assert sizes[28] == [360]
    assert max(sizes[256]) == 15


def test_the_network_before_training_is_drawn_without_seeding_gpus(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    network = initial_network({"model": {"name": "mlp4x24"}, "seed": 3}, load_data("digits"))
    assert torch.equal(torch.get_rng_state(), before)
    assert not seeded
    torch.manual_seed(3)
    again = create_model("mlp4x24", num_classes=10, input_size=(1, 8, 8))
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
