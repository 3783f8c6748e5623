"""Cached latents are read as they were written; damage and other formats are refused."""

import pickle

import numpy as np
import pytest
import torch
from helpers.tiny_latents import NAMES, write_latents
from helpers.tiny_models import THREE_PETS

from dataset.images import collate
from dataset.latents import LatentData
from hierarchy import Hierarchy


def test_latent_data_reads_what_was_written(tmp_path):
    moments = write_latents(tmp_path)
    data = LatentData(tmp_path, THREE_PETS)
    assert len(data) == 4 and data.labels.tolist() == [0, 0, 1, 2] and data.fingerprint == "abc"
    assert data.paths == NAMES
    item, label, shown = data[2]
    assert item.dtype == torch.float16 and label == 1 and shown == 2
    assert torch.equal(item, torch.from_numpy(moments[2]))
    item.zero_()  # a copy, not the file
    assert torch.equal(data[2][0], torch.from_numpy(moments[2]))
    assert data[1][2] == 0  # its substitute


@pytest.mark.parametrize("workers", [0, 1])
def test_latent_data_gives_complete_batches(workers, tmp_path):
    moments = write_latents(tmp_path)
    rows = [[3, 0], [1, 2], [2, 2]]
    data = LatentData(tmp_path)
    loader = torch.utils.data.DataLoader(data, batch_sampler=rows, collate_fn=collate, num_workers=workers)
    for wanted, (x, y, shown) in zip(rows, loader, strict=True):
        assert torch.equal(x, torch.from_numpy(moments[wanted])) and y.tolist() == data.labels[wanted].tolist()
        assert shown.tolist() == [i - (i == 1) for i in wanted]


def test_latent_data_does_not_pickle_its_array(tmp_path):
    write_latents(tmp_path)
    data = LatentData(tmp_path)
    assert data[3][0].abs().max() > 0
    np.save(tmp_path / "moments.npy", np.zeros((4, 2, 8, 3, 3), np.float16))
    assert pickle.loads(pickle.dumps(data))[3][0].abs().max() == 0


def test_another_hierarchy_another_format_and_unfinished_latents_are_refused(tmp_path):
    write_latents(tmp_path)
    LatentData(tmp_path, THREE_PETS)
    with pytest.raises(ValueError, match="labelled by another hierarchy"):
        LatentData(tmp_path, Hierarchy(THREE_PETS.classes, THREE_PETS.superclasses, [0, 1, 1]))
    write_latents(tmp_path, format="other")
    with pytest.raises(ValueError, match="latents.json is of format 'other', expected 'finediffusion-latents-2'"):
        LatentData(tmp_path)
    (tmp_path / "latents.json").unlink()
    with pytest.raises(ValueError, match="has no latents.json"):
        LatentData(tmp_path)


def test_ranks_share_the_verification(tmp_path):
    write_latents(tmp_path)
    content = bytearray((tmp_path / "moments.npy").read_bytes())
    content[-1] ^= 1  # in chunk 1, the last image
    (tmp_path / "moments.npy").write_bytes(content)
    data = LatentData(tmp_path)
    data.verify(0, 2)
    for rank, world in ((1, 2), (0, 1)):
        with pytest.raises(ValueError, match=r"moments.npy is damaged in images 3 to 3 .*encode the images"):
            data.verify(rank, world)
