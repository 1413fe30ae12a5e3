"""Every network of this project, by the name that its file's metadata has for it."""

from __future__ import annotations

from models.adaptation import AdaptationNet
from models.attention_unet import AttentionUnet
from models.attribute_classifier import AttributeClassifier
from models.autoencoder import Autoencoder
from models.context_unet import ContextUnet
from models.dann import NETS as DANN_NETS
from models.ddim_unet import DdimUnet
from models.digit_classifier import DigitClassifier, DigitResNet
from models.gan import GENERATORS
from models.latent_unet import LatentUnet
from models.network import Network
from models.noisy_classifier import NoisyClassifier
from models.scene_classifier import SceneClassifier
from models.text_to_image import TextToImage

NETS: dict[str, type[Network]] = {
    **GENERATORS,
    **DANN_NETS,
    "context_unet": ContextUnet,
    "attention_unet": AttentionUnet,
    "ddim_unet": DdimUnet,
    "latent_unet": LatentUnet,
    "autoencoder": Autoencoder,
    "noisy_classifier": NoisyClassifier,
    "attribute_classifier": AttributeClassifier,
    "digit_classifier": DigitClassifier,
    "digit_resnet": DigitResNet,
    "adaptation": AdaptationNet,
    "text_to_image": TextToImage,
    "scene_classifier": SceneClassifier,
}
