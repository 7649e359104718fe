"""The table of all checkpoints, and what is said of folders that are not condzoo's own releases."""

import dataclasses
import shutil

import pytest
import torch

from condzoo.checkpoints.folder import read_folder
from condzoo.checkpoints.model_card import model_card
from condzoo.checkpoints.overview import Row, checkpoints_table, pairs_section, row_of
from condzoo.conversion import convert
from condzoo.models import create_model

PLAIN = Row("cifar_resnet20", "mine", "cifar10", error="7.50", lambda_max="30.1", trained_by={"optim.lr": "0.01"})
TWIN = dataclasses.replace(PLAIN, arch="cifar_resnet20_lastbn", error="7.20", lambda_max="10.9")


def first_cells(rows):
    return [line.split(" | ")[0] for line in pairs_section(rows)[6:]]


def test_a_pair_says_what_else_its_recipes_differ_in():
    assert first_cells([PLAIN, TWIN]) == ["| cifar_resnet20.mine -> cifar_resnet20_lastbn"]
    faster = dataclasses.replace(TWIN, trained_by={"optim.lr": "0.1", "data.cutout": "8"})
    differ = "(data.cutout none -> 8, optim.lr 0.01 -> 0.1)"
    assert first_cells([PLAIN, faster]) == [f"| cifar_resnet20.mine -> cifar_resnet20_lastbn {differ}"]


@pytest.mark.parametrize("change", [{"data": "cifar100"}, {"lambda_max": "-"}])
def test_networks_of_other_data_or_without_numbers_are_no_pair(change):
    assert pairs_section([PLAIN, dataclasses.replace(TWIN, **change)]) == []


def test_what_decides_a_result_is_read_from_the_recipe(made_checkpoint):
    fields = row_of(read_folder(made_checkpoint)).trained_by
    expected = {
        "epochs": "2",
        "data.batch_size": "256",
        "data.resize": "12",
        "optim.lr": "0.1",
        "schedule.name": "constant",
    }
    assert expected.items() <= fields.items()
    assert not {"seed", "model.name", "probe.every", "data.download"} & fields.keys()


def test_a_renamed_folder_is_where_its_link_leads(checkpoint):
    renamed = shutil.copytree(checkpoint, checkpoint.parent / "the best")
    assert "| [mlp4x24_bn.digits](the%20best/README.md) | digits |" in checkpoints_table([renamed])


def test_only_condzoos_own_releases_are_said_to_be(made_checkpoint, index):
    own = index.parent / made_checkpoint.name
    by_name = 'load_checkpoint("mlp4x24_bn.digits")  # one of condzoo\'s own releases'
    assert by_name in (own / "README.md").read_text()
    assert "`condzoo verify --all` measures all of it again" in checkpoints_table([own])
    index.write_text("")
    users = (made_checkpoint / "README.md").read_text()
    assert users == model_card(read_folder(made_checkpoint))
    assert "own releases" not in users
    assert 'load_checkpoint("FOLDER/mlp4x24_bn.digits")' in users
    table = checkpoints_table([made_checkpoint])
    assert "Made by condzoo of the checkpoints beside it; `condzoo verify FOLDER`" in table


def test_converted_ones_have_a_row_and_no_numbers(tmp_path):
    torch.save(create_model("mlp4x24").state_dict(), tmp_path / "w.pth")
    made = convert(tmp_path / "w.pth", "mlp4x24", out=tmp_path / "out")
    table = (made.parent / "README.md").read_text()
    assert "| [mlp4x24.converted](mlp4x24.converted/README.md) | from w.pth | - | - | - | - | - |" in table
    assert "condzoo release" not in table
