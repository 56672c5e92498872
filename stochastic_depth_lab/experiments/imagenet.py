"""ImageNet as in Huang et al. 2016: He et al.'s 152 layers, pictures scaled and cropped as in fb.resnet.torch.

The paper trains for 90 epochs, stochastic depth for 30 more. Batches of 256 are fb.resnet.torch's; its colour
jitter and lighting noise are left out. 10,000 training pictures are for validation; the 50,000 of `val`
are the test part.
"""

from dataclasses import replace

from stochastic_depth_lab.experiments.config import Data, Model, Recipe
from stochastic_depth_lab.experiments.pairs import pair

RECIPE = Recipe(epochs=90, batch_size=256, lr_drops=(1 / 3, 2 / 3))

# Huang et al. 2016: 21.78 % constant, 21.98 % stochastic with 30 more epochs, a drop of the rate before them; no time.
# Here: about 21,500 h each on one core of an AMD EPYC, extrapolated from three steps of 8 pictures, fp32.
# stochastic-depth reproduce imagenet-152 --out runs/imagenet-152 --data-root FOLDER
IMAGENET_152_CONSTANT, IMAGENET_152_STOCHASTIC = pair(
    "imagenet-152",
    "ImageNet, 152 layers",
    Data("imagenet", flip=True),
    RECIPE,
    model=Model(152, family="imagenet", shortcut="projection"),
    stochastic_recipe=replace(RECIPE, epochs=120, lr_drops=(0.25, 0.5, 0.75)),
    published=(21.78, 21.98),
)
