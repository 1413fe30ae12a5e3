#!/usr/bin/env bash
# The trainings of the released models of faces, and of text to image, on one GPU.
#
#   bash tools/train_on_gpu.sh DATA_DIR OUTPUT_DIR
#
# DATA_DIR has face/train and face/val, and captioned/ and textual_inversion/ as prepare_data.py
# synthetic --captioned 24000 1000 draws them. Every step is a run directory that continues where it was
# stopped, and is skipped once it is finished. The steps share one autoencoder.
set -euo pipefail
data=$1
out=$2
cd "$(dirname "$0")/.."
gpu="--device cuda --precision bf16"

# 1. The autoencoder: about 280,000 images.
python p2_autoencoder.py train --data-dir "$data" --output-dir "$out/autoencoder" \
    --epochs 40 --batch-size 32 $gpu
latents="--autoencoder $out/autoencoder/model.safetensors"

# 2. The score-based model and the DDPM in its latents: 4 million images each.
python p2_score.py train --data-dir "$data" --output-dir "$out/score" $latents \
    --blocks 1 --epochs 40 --images-per-epoch 100000 --batch-size 256 --lr 1e-3 \
    --ema-decay 0.9995 $gpu
python p2_ddpm_train.py --domains faces --net ddim --width 64 --blocks 1 --prediction v --rule respaced \
    --data-dir "$data" --output-dir "$out/ddpm" $latents --flip \
    --epochs 40 --images-per-epoch 100000 --batch-size 256 --lr 1e-3 $gpu

# 3. Faces by attribute: the network, the classifier that guides, and the one that measures.
python p2_guided.py train --init "$out/ddpm/model.safetensors" --data-dir "$data" \
    --output-dir "$out/guided" --epochs 10 --images-per-epoch 100000 --batch-size 256 --lr 5e-4 $gpu
python p2_guided.py train-classifier --checkpoint "$out/ddpm/model.safetensors" \
    --data-dir "$data" --output-dir "$out/noisy-classifier" --epochs 30 --batch-size 256 $gpu
python evaluate.py train-attributes --data-dir "$data" --output-dir "$out/evaluator" \
    --epochs 20 $gpu

# 4. The tables: attributes, the samplers by number of calls, and faces by T.
python experiments/guidance.py --data-dir "$data" --output-dir "$out/guidance" \
    --checkpoint "$out/guided/model.safetensors" \
    --unconditional "$out/ddpm/model.safetensors" \
    --classifier "$out/noisy-classifier/model.safetensors" \
    --evaluator "$out/evaluator/model.safetensors" --count 50 --pooled 1000 --batch-size 250 $gpu
python p2_score.py table --checkpoint "$out/score/model.safetensors" --data-dir "$data" \
    --output-dir "$out/score-table" --batch-size 250 $gpu
python experiments/faces_by_timesteps.py --data-dir "$data" --output-dir "$out/timesteps" \
    $latents --prediction v --images 1000000 --batch-size 256 --lr 1e-3 $gpu

# 5. Text to image: the model (4 million images), what measures it, and two learned words.
python p3_textual_inversion.py train-model --data-dir "$data" --output-dir "$out/text-to-image" \
    --epochs 40 --images-per-epoch 100000 --batch-size 256 --ema-decay 0.9995 $gpu
if [ ! -d "$out/other-drawings" ]; then
    python prepare_data.py synthetic --data-dir "$out/other-drawings" --seed 1 --captioned 12000 1000
fi
python p3_clip_zeroshot.py pretrain --captioned --data-dir "$out/other-drawings" \
    --output-dir "$out/clip-scenes" --batch-size 256 $gpu
python evaluate.py train-scenes --data-dir "$out/other-drawings" \
    --output-dir "$out/scene-classifier" $gpu
python experiments/text_to_image.py --model "$out/text-to-image/model.safetensors" \
    --classifier "$out/scene-classifier/model.safetensors" --output-dir "$out/text-to-image-scores"
python p3_textual_inversion.py train "$data/textual_inversion/input.json" \
    --model "$out/text-to-image/model.safetensors" --output-dir "$out/words"
python experiments/inversion.py --model "$out/text-to-image/model.safetensors" \
    --words "$out/words/words.safetensors" --clip "$out/clip-scenes/model.safetensors" \
    --classifier "$out/scene-classifier/model.safetensors" --output-dir "$out/words-scores"

# 6. The reports' networks beside ours, each with the same number of images and seed 0: 2 million
# digits for the three U-Nets, 1 million faces for the GANs of the larger networks.
for net in context attention ddim; do
    python p2_ddpm_train.py --data-dir "$data" --domains mnistm --net $net --timesteps 400 \
        --output-dir "$out/nets/$net" --epochs 20 --images-per-epoch 100000 --batch-size 256 $gpu
    python p2_ddpm_infer.py --checkpoint "$out/nets/$net/model.safetensors" --guidance 1 \
        --output-dir "$out/nets/$net-digits" --device cuda
    python evaluate.py digits "$out/nets/$net-digits" --data-dir "$data" --domain mnistm \
        --classifier checkpoints/digit_classifier_mnistm.safetensors --output-dir "$out/nets/$net-score"
done
for options in "" "--net projection" "--spectral" "--net projection --spectral"; do
    name=wgangp$(tr -d ' -' <<< "$options")
    # shellcheck disable=SC2086  # several words
    python p1_wgangp.py train --data-dir "$data" --output-dir "$out/nets/$name" --epochs 143 \
        --n-critic 1 --lr 2e-4 --drift 0.001 --augment translation $options $gpu
    python p1_wgangp.py sample --checkpoint "$out/nets/$name/model.safetensors" --num-images 2000 \
        --output-dir "$out/nets/$name-faces" --device cuda
    python evaluate.py kid "$out/nets/$name-faces" "$data/face/val" --output-dir "$out/nets/$name-kid"
done
