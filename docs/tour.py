# %% [markdown]
# # A tour of the course
#
# Six methods in the order of the course, with the networks that were released with the code.
# Nothing is trained here. On two CPU cores all of it takes less than two minutes.
#
# Each cell runs commands of the repository, as they can be typed in a terminal, with `python`
# before them. `python SCRIPT.py COMMAND --help` explains every option. README has the papers and
# the results, and the pages in `docs` have all numbers.

# %%
import os
import shlex
import subprocess
import sys
from pathlib import Path

# The address that `git clone` takes: this repository's, or that of your copy of it.
# It is needed only where the notebook was opened without the repository, as in Colab.
REPOSITORY = ""

here = Path.cwd()
roots = [folder for folder in (here, *here.parents) if (folder / "profiles.toml").is_file()]
if roots:
    root = roots[0]
else:
    root = here / "course"
    if not root.exists():
        if not REPOSITORY:
            raise RuntimeError("REPOSITORY: write the address of the repository between the quotes")
        clone = ["git", "clone", "--quiet", "--depth", "1", REPOSITORY, str(root)]
        subprocess.run(clone, check=True)
    # The packages that the scripts need: a few minutes, about 6 GB with the CUDA libraries.
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", str(root)], check=True)
os.chdir(root)

# %% [markdown]
# Two small helpers. `run` runs a command, and stops with the command's message if it fails.
# `show_folder` joins the images of a folder to one picture. All files are written to
# `output-tour`.

# %%
from IPython.display import Image, display


def python(*words):
    """Run Python with these words; its output is shown only if it fails."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)


def run(command):
    """Run a command of the repository."""
    python(*shlex.split(command))


def show(file, width=None):
    """Show a picture, `width` pixels wide if that is given."""
    display(Image(filename=file, width=width))


# It runs in a Python of its own, which has the packages that were just installed.
JOIN = """
import sys
from pathlib import Path
from PIL import Image

folder, picture, columns = sys.argv[1:]
images = [Image.open(file) for file in sorted(Path(folder).rglob("*.png"))]
width, height = images[0].size
rows = len(images) // int(columns)
joined = Image.new("RGB", (int(columns) * width, rows * height))
for number, image in enumerate(images):
    row, column = divmod(number, int(columns))
    joined.paste(image, (column * width, row * height))
joined.save(picture)
"""


def show_folder(folder, columns):
    """Show all images of a folder, and of the folders in it, as one picture."""
    picture = f"{folder}.png"
    python("-c", JOIN, folder, picture, str(columns))
    show(picture, width=128 * columns)


# %% [markdown]
# ## 1. Faces by seed: WGAN-GP
#
# A generator turns 100 random numbers into a face, in one pass. In training a critic scores how
# real its faces look; the gradient penalty keeps the critic smooth ([docs/gan.md](gan.md)).
#
# Face k depends on the seed and on k alone: with another `--seed` there are 32 other faces. None
# were picked. Most look like a face at first sight; look at eyes and hair for where they fail.

# %%
run("""
    p1_wgangp.py sample --checkpoint checkpoints/wgangp_faces.safetensors --num-images 32
    --output-dir output-tour/faces --grid output-tour/faces.png
""")
show("output-tour/faces.png")

# %% [markdown]
# ## 2. Digits by class: DDPM with guidance
#
# A diffusion model learns to remove noise from images. It draws by starting from pure noise and
# removing it in steps, here 12 steps of DPM-Solver++. The first picture shows a zero on its way
# ([docs/ddpm.md](ddpm.md)).
#
# Classifier-free guidance moves every step further towards the class that is asked, with strength
# w. In the second picture both rows start from the same noises. Without guidance (w = 0) some
# digits are faint or broken; with w = 1.5 in every step they stand out. Look
# at how the colours change too: guidance makes them stronger.

# %%
run("""
    p2_ddpm_infer.py --checkpoint checkpoints/ddpm_digits.safetensors --domains mnistm
    --per-class 1 --steps 12 --guidance 1.5 --guidance-sweep 0 1.5
    --output-dir output-tour/digits --plots-dir output-tour/digit-plots
""")
show("output-tour/digit-plots/mnistm_reverse.png", width=800)
show("output-tour/digit-plots/mnistm_guidance.png", width=800)

# %% [markdown]
# ## 3. From one face to another: DDIM
#
# DDIM removes noise without adding any on the way, so that the same noise always gives the same
# face. Between two noises there are others, and each of them gives a face too
# ([docs/ddim.md](ddim.md)).
#
# The way is slerp, along the sphere, so that the noises between keep the length of real noise.
# Look at how hair, background and expression change little by little. This network is small and
# was trained for about two hours on one core: its faces are still noisy.

# %%
run("prepare_data.py noises --output-dir output-tour/noises --count 2")
run("""
    p2_ddim.py interpolate --noise-dir output-tour/noises --method slerp
    --checkpoint checkpoints/ddim_faces.safetensors --output-dir output-tour/ddim
""")
show("output-tour/ddim/slerp.png")

# %% [markdown]
# ## 4. Digits of another domain: DANN
#
# A classifier learns from labelled MNIST-M and from USPS without labels. A second network tries
# to see from the features which domain an image is of; its gradient is reversed, so that the
# features hide it ([docs/dann.md](dann.md)).
#
# t-SNE puts images with similar features side by side. In the first plot each class should be a
# cluster of its own. In the second plot both domains should lie in every cluster. The images are
# drawn by `prepare_data.py`, but the network has learned from the real data sets.

# %%
run("""
    prepare_data.py synthetic --data-dir output-tour/data
    --mnistm 20 200 --svhn 20 20 --usps 20 200 --face 20 20 --clip-zeroshot 24 24 --objects 24
    --captioned 20 4
""")
run("""
    p3_dann.py embed --checkpoint checkpoints/dann_usps.safetensors --per-domain 200
    --data-dir output-tour/data --output-dir output-tour/dann
""")
show("output-tour/dann/tsne_class.png", width=500)
show("output-tour/dann/tsne_domain.png", width=500)

# %% [markdown]
# ## 5. Faces by attribute: guided diffusion
#
# This diffusion model also reads attributes, each there, not there or unknown. Guidance moves
# every step away from what it would draw without them ([docs/guided.md](guided.md)).
#
# Both rows start from the same ten noises, and the strength is 4. The faces of the first row smile,
# and those of the second have blond hair. Look also at what changes although it was not asked, such
# as skin and background. The attributes are labels of CelebA: they say what an annotator saw in a
# photo.

# %%
run("""
    p2_guided.py grid --checkpoint checkpoints/guided_faces.safetensors --guidance free --scale 4
    --attributes Smiling=1 Blond_Hair=1 --scales 4 --steps 25 --output-dir output-tour/guided
""")
show("output-tour/guided/attributes.png", width=800)

# %% [markdown]
# ## 6. A new word: textual inversion
#
# A text-to-image model gets a new word from five images: only the embedding of that word is
# learned, and the model stays as it is ([docs/textual_inversion.md](textual_inversion.md)). The
# released words are `<new1>`, a creature, and `<new2>`, a way of printing. These are the images
# that they were learned from.

# %%
show_folder("output-tour/data/textual_inversion", columns=5)

# %% [markdown]
# Now the prompts use the words. One row each: `A <new1> on a plain blue background.`, then on a
# striped pink background; `A car in the style of <new2>.`, then a house on a striped background.
#
# The creature's colour and its horns came through, its single eye did not. The style is harder:
# cars and houses can be seen, but not the two tones of the print. The page has the scores.

# %%
run("""
    p3_textual_inversion.py generate output-tour/data/textual_inversion/input.json
    output-tour/words checkpoints/text_to_image.safetensors
    --embeddings checkpoints/text_to_image_words.safetensors --count 4 --steps 20
""")
show_folder("output-tour/words", columns=4)
