"""Claims about spectrograms and previews."""
import io

import numpy as np
import scipy.io.wavfile
from fabricated import pairs

from parts.audio import RATE
from parts.spectrograms import draw_previews, draw_spectrogram, spectrogram_png


def test_previews_are_a_picture_sounds_and_captions(tmp_path):
    (tmp_path / "samples").mkdir()
    draw_previews(tmp_path, 7, pairs())
    names = {file.name for file in (tmp_path / "samples").iterdir()}
    sounds = {"real-0.wav", "real-1.wav", "step000007-0.wav", "step000007-1.wav"}
    assert names == sounds | {"step000007.png", "captions.txt"}
    rate, made = scipy.io.wavfile.read(tmp_path / "samples" / "step000007-1.wav")
    assert rate == RATE and np.abs(made / 32_767 - pairs()[1][2]).max() < 1e-4
    captions = (tmp_path / "samples" / "captions.txt").read_text()
    assert captions == "0: $caption 0: rain, then wind_\n1: $caption 1: rain, then wind_\n"


def test_a_full_scale_sine_is_at_0_db():
    import matplotlib.pyplot as plt

    x = np.sin(2 * np.pi * 1_000 * np.arange(RATE) / RATE).astype(np.float32)
    fig, ax = plt.subplots()
    db = draw_spectrogram(ax, x, "a sine").get_array()    # (513, frames)
    assert abs(db.max()) < 0.1 and set(db[:, 3:-3].argmax(0)) == {64}
    plt.close(fig)


def test_a_small_picture_shows_time_to_the_right_and_frequency_upwards():
    """A 2 kHz sine in the second half: bright on the right, a quarter of the height up; black on the left."""
    from PIL import Image

    t = np.arange(2 * RATE) / RATE
    x = np.where(t > 1, 0.5 * np.sin(2 * np.pi * 2_000 * t), 0).astype(np.float32)
    content = spectrogram_png(x)
    level = np.array(Image.open(io.BytesIO(content)).convert("L"), int)
    row = level[:, 80:].sum(1).argmax()
    assert level.shape == (96, 101) and abs((96 - row - 0.5) / 96 - 0.25) < 0.02
    assert level[:, :45].max() < 5 and level[row, 60:].min() > 120 and len(content) < 10_000
    noise = 0.1 * np.random.default_rng(0).standard_normal(10 * RATE).astype(np.float32)
    assert Image.open(io.BytesIO(spectrogram_png(noise))).size == (128, 96)


def test_a_caption_in_a_script_that_the_font_lacks_is_drawn_without_a_warning(tmp_path, recwarn):
    (_, real, made), *_ = pairs()
    draw_previews(tmp_path, 7, [("狗在叫 🐕", real, made)])
    assert not recwarn.list
