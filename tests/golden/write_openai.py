"""Write the folders beside this file that TensorFlow itself has to write; reading them needs none.

pip install tensorflow-cpu, then: write_openai.py. Written with TensorFlow 2.21.
openai: a tiny GPT-2 as OpenAI published theirs, with its logits. openai_trained: the same after a step of training,
with the optimizer's variables, in two data files. dtypes: a variable of each number type.
"""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import tensorflow.compat.v1 as tf

FOLDER = Path(__file__).parent
HPARAMS = {"n_vocab": 257, "n_ctx": 8, "n_embd": 8, "n_head": 2, "n_layer": 2}


def variable(name, shape):
    return tf.get_variable(name, shape, initializer=tf.random_normal_initializer(stddev=0.3, seed=len(name)))


def norm(x, scope):
    width = HPARAMS["n_embd"]
    with tf.variable_scope(scope):
        scale, shift = variable("g", [width]), variable("b", [width])
    mean = tf.reduce_mean(x, axis=-1, keepdims=True)
    variance = tf.reduce_mean(tf.square(x - mean), axis=-1, keepdims=True)
    return (x - mean) * tf.math.rsqrt(variance + 1e-5) * scale + shift


def linear(x, scope, width):
    """A convolution over one position: its weight has three axes, the first of length 1."""
    with tf.variable_scope(scope):
        weight, bias = variable("w", [1, x.shape[-1], width]), variable("b", [width])
    return tf.tensordot(x, weight[0], 1) + bias


def attention(x, scope):
    width, n_head = HPARAMS["n_embd"], HPARAMS["n_head"]
    length = tf.shape(x)[1]
    with tf.variable_scope(scope):
        parts = tf.split(linear(x, "c_attn", 3 * width), 3, axis=2)
        q, k, v = (tf.transpose(tf.reshape(y, [-1, length, n_head, width // n_head]), [0, 2, 1, 3]) for y in parts)
        scores = tf.matmul(q, k, transpose_b=True) / math.sqrt(width // n_head)
        causal = tf.linalg.band_part(tf.ones([length, length]), -1, 0)
        weights = tf.nn.softmax(scores * causal - 1e10 * (1 - causal))
        merged = tf.reshape(tf.transpose(tf.matmul(weights, v), [0, 2, 1, 3]), [-1, length, width])
        return linear(merged, "c_proj", width)


def feed_forward(x, scope):
    with tf.variable_scope(scope):
        h = linear(x, "c_fc", 4 * HPARAMS["n_embd"])
        h = 0.5 * h * (1 + tf.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * tf.pow(h, 3))))
        return linear(h, "c_proj", HPARAMS["n_embd"])


def model(ids):
    with tf.variable_scope("model"):
        wpe = variable("wpe", [HPARAMS["n_ctx"], HPARAMS["n_embd"]])
        wte = variable("wte", [HPARAMS["n_vocab"], HPARAMS["n_embd"]])
        x = tf.gather(wte, ids) + wpe[: tf.shape(ids)[1]]
        for layer in range(HPARAMS["n_layer"]):
            with tf.variable_scope(f"h{layer}"):
                x = x + attention(norm(x, "ln_1"), "attn")
                x = x + feed_forward(norm(x, "ln_2"), "mlp")
        return tf.tensordot(norm(x, "ln_f"), wte, [[2], [1]])


def save(saver, session, folder, **arrays):
    folder.mkdir(exist_ok=True)
    saver.save(session, str(folder / "model.ckpt"), write_meta_graph=False)
    np.savez(folder / "logits.npz", **arrays)


def write_models():
    ids = np.random.default_rng(0).integers(HPARAMS["n_vocab"], size=(2, HPARAMS["n_ctx"]))
    devices = itertools.cycle(["/cpu:0", "/cpu:1"])
    with tf.Graph().as_default(), tf.device(lambda op: next(devices) if "Variable" in op.type else "/cpu:0"):
        logits = model(tf.constant(ids))
        saver = tf.train.Saver(save_relative_paths=True)
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=ids, logits=logits))
        step = tf.train.AdamOptimizer(0.01).minimize(loss, global_step=tf.train.get_or_create_global_step())
        trained = tf.train.Saver(save_relative_paths=True, sharded=True)
        with tf.Session(config=tf.ConfigProto(device_count={"CPU": 2})) as session:
            session.run(tf.global_variables_initializer())
            save(saver, session, FOLDER / "openai", ids=ids, logits=session.run(logits))
            session.run(step)
            save(trained, session, FOLDER / "openai_trained", ids=ids, logits=session.run(logits))
    for name in ("openai", "openai_trained"):
        (FOLDER / name / "hparams.json").write_text(json.dumps(HPARAMS))


def write_dtypes():
    values = np.linspace(-2, 2, 6).reshape(2, 3)
    types = (tf.float16, tf.bfloat16, tf.float32, tf.float64, tf.int32, tf.int64)
    with tf.Graph().as_default(), tf.Session() as session:
        for dtype in types:
            tf.get_variable(dtype.name, initializer=tf.cast(values, dtype))
        tf.get_variable("string", initializer=tf.constant(["text"]))
        tf.get_variable("sliced", [4, 2], partitioner=tf.fixed_size_partitioner(2))
        session.run(tf.global_variables_initializer())
        arrays = {v.op.name: session.run(v) for v in tf.global_variables() if v.op.name in [t.name for t in types]}
        arrays = {name: array.astype(np.float64) for name, array in arrays.items()}
        save(tf.train.Saver(save_relative_paths=True), session, FOLDER / "dtypes", **arrays)


if __name__ == "__main__":
    tf.disable_eager_execution()
    write_models()
    write_dtypes()
