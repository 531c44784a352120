"""Pictures of stages, differences, codes and curves, against what they must show."""

import numpy as np
import pytest
import torch
from diffusers import ClassifierFreeGuidance
from helpers import tiny_coded_pipeline, tiny_embedder, tiny_pipeline, tiny_transformer, tiny_vae
from PIL import Image, ImageColor
from torch.utils.tensorboard import SummaryWriter

from diffusers_dod.viz import code_maps, plot_curves, read_scalars, stage_code_maps, stage_differences, stage_grid
from diffusers_dod.viz.__main__ import main


def pictures(count, size=(6, 4), mode="RGB", seed=0):
    generator = np.random.default_rng(seed)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return [Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)) for _ in range(count)]


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_row_of_the_grid_is_a_stage_and_a_column_a_sample(mode):
    stages = [pictures(3, mode=mode, seed=seed) for seed in range(2)]
    grid = stage_grid(stages, scale=2)
    assert grid.mode == "RGB" and grid.size == (3 * 12, 2 * 8)
    for row, stage in enumerate(stages):
        for column, picture in enumerate(stage):
            tile = np.asarray(grid)[8 * row : 8 * row + 8, 12 * column : 12 * column + 12]
            assert np.array_equal(tile, np.asarray(picture.convert("RGB")).repeat(2, axis=0).repeat(2, axis=1))


@pytest.mark.parametrize(("size", "enlarged"), [((28, 28), 84), ((4, 4), 84), ((256, 256), 256), ((50, 40), 150)])
def test_small_pictures_are_enlarged_by_a_whole_number(size, enlarged):
    assert stage_grid([pictures(1, size)]).width == enlarged


def test_titles_stand_above_and_beside_the_pictures():
    colours = [["red", "lime"], ["blue", "yellow"]]
    stages = [[Image.new("RGB", (90, 84), colour) for colour in row] for row in colours]
    titled = np.asarray(stage_grid(stages, labels=["goose", "a name that is much too long for its column"]))
    boxes = []
    for colour in ("red", "lime", "blue", "yellow"):
        rows, columns = np.nonzero((titled == ImageColor.getrgb(colour)).all(axis=2))
        assert len(rows) == 90 * 84 and np.ptp(rows) == 83 and np.ptp(columns) == 89
        boxes.append((rows.min(), columns.min()))
    top, left = boxes[0]
    assert boxes[1][0] == top and boxes[2][1] == left and boxes[3] == (boxes[2][0], boxes[1][1])
    # Every title left ink of its own, and that of the long one stays within its column.
    ink = (titled < 128).all(axis=2)
    below, right = boxes[3]
    assert ink[:top, left : left + 90].any() and ink[:top, right : right + 90].sum() > ink[:top, :right].sum()
    assert ink[top : top + 84, :left].any() and ink[below : below + 84, :left].any()
    assert not ink[:top, right - 2 : right].any() and not ink[:top, right + 90 :].any() and not ink[:top, :left].any()


def test_several_samples_per_label_are_rows_of_their_stage():
    stages = [
        [Image.new("RGB", (84, 84), colour) for colour in row] for row in (["red", "lime"] * 2, ["blue", "cyan"] * 2)
    ]
    grid = np.asarray(stage_grid(stages, ["one", "two"]))
    tile = 84 + 4
    for row, colours in enumerate((["red", "lime"], ["red", "lime"], ["blue", "cyan"], ["blue", "cyan"])):
        for column, colour in enumerate(colours):
            centre = grid[-(4 - row) * tile + tile // 2, -(2 - column) * tile + tile // 2]
            assert tuple(centre) == ImageColor.getrgb(colour)


def test_rows_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match="equally many"):
        stage_grid([pictures(2), pictures(1)])
    with pytest.raises(ValueError, match="3 labels for 2 columns"):
        stage_grid([pictures(2)], labels=["a", "b", "c"])


def test_a_difference_is_signed_around_middle_gray():
    before, after = np.array([[10, 200, 60]], dtype=np.uint8), np.array([[10, 100, 160]], dtype=np.uint8)
    stages = [[Image.fromarray(before)], [Image.fromarray(after)], [Image.fromarray(before)]]
    second, third = stage_differences(stages)
    assert np.asarray(second[0]).tolist() == [[128, 78, 178]]
    assert np.asarray(third[0]).tolist() == [[128, 178, 78]]
    with pytest.raises(ValueError, match="two stages"):
        stage_differences(stages[:1])


def test_a_code_map_shows_principal_components_in_their_order():
    generator = torch.Generator().manual_seed(0)
    # Three independent sources of falling strength, turned and shifted into 5 channels.
    sources = torch.randn(4, 12, 3, generator=generator) * torch.tensor([9.0, 3.0, 1.0])
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator))[0][:3]
    maps = code_maps(sources @ turn + 7.0, grid=(3, 4))
    assert len(maps) == 4 and maps[0].size == (4, 3)
    shown = torch.tensor(np.stack([np.asarray(picture) for picture in maps])).flatten(0, 2).double()
    # What went beyond the spread is cut, so strong values only must agree in sign.
    for channel in range(3):
        correlation = torch.corrcoef(torch.stack([shown[:, channel], sources.flatten(0, 1)[:, channel].double()]))[
            0, 1
        ]
        assert abs(correlation) > 0.9
        # Two standard deviations fill the range, whatever the component's strength.
        assert 50 < shown[:, channel].std() < 75


def test_a_component_points_where_its_largest_entry_does():
    for seed in range(8):
        codes = torch.randn(1, 16, 3, generator=torch.Generator().manual_seed(seed))
        codes[..., seed % 3] *= 9
        red = torch.tensor(np.asarray(code_maps(codes, grid=(4, 4))[0]))[..., 0].flatten().float()
        assert torch.corrcoef(torch.stack([red, codes[0, :, seed % 3]]))[0, 1] > 0.9, seed


def test_components_that_the_codes_lack_stay_at_half():
    one_channel = np.asarray(code_maps(torch.tensor([[[0.0], [1.0], [2.0], [3.0]]]), grid=(2, 2))[0])
    assert np.all(one_channel[..., 1:] == 128) and np.all(np.diff(one_channel[..., 0].ravel().astype(int)) > 0)
    assert np.all(np.asarray(code_maps(torch.full((2, 4, 3), 5.0), grid=(2, 2))) == 128)


@pytest.mark.parametrize("vae", [None, "kl"])
def test_stage_maps_show_the_codes_of_the_pipelines_own_embedder(vae):
    pipe = tiny_pipeline(
        vae=vae and tiny_vae(vae),
        latent_embedder=tiny_embedder(patch_size=4, output_patch_size=2, bottleneck_dim=1),
    )
    stages = pipe([1, 2, 3], 2, 2, output_type="latent", return_stages=True, generator=torch.manual_seed(0)).stages
    maps = stage_code_maps(pipe, stages)
    assert [len(stage) for stage in maps] == [3, 3] and maps[0][0].size == (2, 2)
    with torch.no_grad():
        codes = torch.cat([pipe.latent_embedder(stage).codes for stage in stages]).flatten()
    red = np.concatenate([np.asarray(picture)[..., 0].ravel() for stage in maps for picture in stage]).astype(int)
    # A brighter red is a larger code in all samples of all stages.
    assert np.all(np.diff(red[codes.argsort().numpy()]) >= 0) and red.std() > 30


def log(folder, values, name="loss_with_prior"):
    writer = SummaryWriter(folder)
    for step, value in values:
        writer.add_scalar(name, value, step)
    writer.close()


def test_the_steps_that_a_resumed_run_took_again_count_once(tmp_path):
    first, second = tmp_path / "logs" / "train_dod" / "1", tmp_path / "logs" / "train_dod" / "2"
    log(first, [(1, 4.0), (2, 3.0), (3, 99.0)])
    log(second, [(3, 2.0), (4, 1.0)])
    assert read_scalars(tmp_path / "logs") == {"loss_with_prior": [(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0)]}
    with pytest.raises(FileNotFoundError, match="no TensorBoard file"):
        read_scalars(tmp_path / "nothing")


def test_curves_have_a_panel_of_losses_and_one_a_metric(tmp_path):
    scalars = {"loss_with_prior": [(0, 2.0), (10, 1.0)], "loss_without_prior": [(0, 2.0), (10, 1.5)], "lr": [(0, 1.0)]}
    plot_curves(scalars, tmp_path / "losses.svg")
    plot_curves(scalars | {"evaluation/fid_stage_2": [(10, 30.0)]}, tmp_path / "both.png")
    drawn = (tmp_path / "losses.svg").read_text()
    assert "<!-- with prior -->" in drawn and "<!-- without prior -->" in drawn and "<!-- lr -->" not in drawn
    width, height = Image.open(tmp_path / "both.png").size
    assert width > 2 * height  # two panels
    with pytest.raises(ValueError, match="neither a loss nor a metric"):
        plot_curves({"lr": [(0, 1.0)]}, tmp_path / "none.png")


def test_the_command_makes_the_same_pictures_again(tmp_path, capsys):
    model, logs = tmp_path / "model", tmp_path / "logs"
    tiny_pipeline(
        channels=1,
        transformer=tiny_transformer(in_channels=1),
        latent_embedder=tiny_embedder(in_channels=1),
        id2label={number: f"name {number}" for number in range(10)},
    ).save_pretrained(model)
    log(logs, [(1, 2.0), (2, 1.0)])
    options = ["--model", str(model), "--num_inference_steps", "2", "--num_stages", "3", "--logs", str(logs)]
    for name in ("a", "b"):
        assert main([*options, "--output_dir", str(tmp_path / name)]) == 0
    assert main([*options, "--output_dir", str(tmp_path / "c"), "--classes", "name 4", "5"]) == 0
    names = {"stages.png", "differences.png", "codes.png", "curves.png"}
    assert {file.name for file in (tmp_path / "a").iterdir()} == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    all_stages, two = (np.asarray(Image.open(tmp_path / folder / "stages.png")) for folder in "ac")
    assert all_stages.shape[0] == two.shape[0] and two.shape[1] < all_stages.shape[1] / 3

    assert main([*options, "--output_dir", str(tmp_path / "d"), "--classes", "name 44"]) == 2
    assert "name 4" in capsys.readouterr().err and not (tmp_path / "d").exists()


def test_a_latent_model_is_drawn_through_its_autoencoder(tmp_path):
    tiny_pipeline(vae=tiny_vae("kl")).save_pretrained(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path), "--num_inference_steps", "1"]
    assert main([*options, "--num_stages", "1", "--classes", "0"]) == 0
    assert Image.open(tmp_path / "stages.png").mode == "RGB"


def test_a_pipeline_with_a_guider_is_drawn_with_it(tmp_path, capsys):
    pipe = tiny_pipeline(channels=1)
    options = ["--num_inference_steps", "4", "--classes", "0"]
    for scale in (1.0, 3.0):
        pipe.guider = ClassifierFreeGuidance(scale)
        pipe.save_pretrained(tmp_path / "model")
        argv = [*options, "--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / str(scale))]
        assert main(argv) == 0
    one, three = ((tmp_path / str(scale) / "stages.png").read_bytes() for scale in (1.0, 3.0))
    assert one != three
    assert main([*argv, "--guidance_scale", "2"]) == 2 and "guider" in capsys.readouterr().err


def test_guided_codes_give_other_pictures(tmp_path):
    embedder = tiny_embedder(in_channels=1, codes_mean=[0.1, -0.2], codes_std=[0.5, 2.0])
    pipe = tiny_coded_pipeline(channels=1, latent_embedder=embedder)
    pipe.save_pretrained(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--num_inference_steps", "2", "--classes", "0"]
    for scale in ("1", "3"):
        assert main([*options, "--output_dir", str(tmp_path / scale), "--code_guidance_scale", scale]) == 0
    one, three = ((tmp_path / scale / "stages.png").read_bytes() for scale in ("1", "3"))
    assert one != three


def test_latents_without_their_autoencoder_are_no_pictures(tmp_path, capsys):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--num_inference_steps", "1", "--output_dir", str(tmp_path / "out")]
    assert main(options) == 2
    assert "they are latents, not pictures" in capsys.readouterr().err and not (tmp_path / "out").exists()
