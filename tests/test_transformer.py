"""The Transformer in plain torch: attention, factorization, incremental decoding, beam search, text and corpora."""

import gzip
import http.server
import io
import itertools
import tarfile
import threading
from dataclasses import asdict

import pytest
import torch
from torch import nn

from common import FactorizedEmbedding, FactorizedLinear, MultiheadAttention, balance_
from common.budget import count_parameters
from common.linalg import balance, compose, spectral_init
from transformer_iwslt import corpora, prepare
from transformer_iwslt.beam import search
from transformer_iwslt.model import (
    EOS,
    PAD,
    Transformer,
    TransformerConfig,
    attentions,
    count_full,
    from_checkpoint,
)
from transformer_iwslt.text import Pipeline, Vocabulary, learn_codes

SMALL = {"embed_dim": 16, "ffn_dim": 24, "heads": 4, "layers": 2, "max_positions": 40}


def make(seed=0, **options):
    torch.manual_seed(seed)
    return Transformer(TransformerConfig(**({"source_words": 23, "target_words": 29} | SMALL | options)))


def sentences(batch=3, length=7, words=23):
    source = torch.randint(4, words, (batch, length))
    source[:, -1] = EOS
    return source


@pytest.mark.parametrize("causal", [False, True])
def test_attention_of_full_heads_is_torchs(causal):
    torch.manual_seed(0)
    ours = MultiheadAttention(12, 3).double()
    torchs = nn.MultiheadAttention(12, 3, bias=False, batch_first=True).double()
    with torch.no_grad():
        torchs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        torchs.out_proj.weight.copy_(ours.output.weight)
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    memory = x if causal else torch.randn(2, 6, 12, dtype=torch.float64)
    padded = torch.zeros(memory.shape[:2], dtype=torch.bool)
    padded[1, :2] = not causal
    forbidden = torch.ones(5, 5, dtype=torch.bool).triu(1) if causal else None
    expected, _ = torchs(x, memory, memory, key_padding_mask=padded, attn_mask=forbidden, need_weights=False)
    mask = None if causal else ~padded[:, None, None, :]
    found = ours(x, ours.project(memory), mask, causal=causal)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    probe = torch.randn_like(found)
    for one, other in zip(*(torch.autograd.grad((y * probe).sum(), x) for y in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_attention_is_what_its_two_products_say():
    """Narrow heads, computed head by head from the (embed_dim, embed_dim) products of their factor pairs."""
    torch.manual_seed(0)
    attention = MultiheadAttention(12, 3, head_dim=2).double()
    x = torch.randn(5, 12, dtype=torch.float64)
    query_key, output_value = (compose(pair(" ").factors()) for pair in (attention.query_key, attention.output_value))
    assert query_key.shape == output_value.shape == (3, 12, 12)
    heads = [(x @ qk @ x.T / 2**0.5).softmax(-1) @ x @ ov.T for qk, ov in zip(query_key, output_value, strict=True)]
    torch.testing.assert_close(attention(x[None], attention.project(x[None]))[0], sum(heads), rtol=1e-12, atol=1e-12)


def test_balancing_keeps_the_product_and_is_the_truncated_svd():
    torch.manual_seed(0)
    attention = MultiheadAttention(12, 3, head_dim=2).double()
    for pair in (attention.query_key("qk"), attention.output_value("ov")):
        before = compose(pair.factors()).clone()
        balance_(pair)
        torch.testing.assert_close(compose(pair.factors()), before, rtol=1e-12, atol=1e-12)
        for u, vt, product in zip(*pair.factors(), before, strict=True):
            expected_u, expected_vt = spectral_init(product, 2)
            signs = (expected_u * u).sum(0).sign()
            torch.testing.assert_close(u, expected_u * signs, rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(vt, expected_vt * signs[:, None], rtol=1e-9, atol=1e-10)


def test_balance_names_a_rank_above_the_sides():
    with pytest.raises(ValueError, match="rank 5 exceeds the shorter side of the 4 x 9 product"):
        balance(torch.randn(4, 5), torch.randn(5, 9))


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_incremental_decoding_is_full_decoding(scale):
    model = make(rank_scale=scale).double().eval()
    source, target = sentences(), torch.randint(4, 29, (3, 6))
    source[1, :2] = PAD
    full = model(source, target)
    state = model.decoder.start(*model.encoder(source))
    steps = [model.decoder(target[:, [i]], state) for i in range(6)]
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-11, atol=1e-11)


def test_a_state_follows_its_sentences():
    model = make().double().eval()
    source, target = sentences(), torch.randint(4, 29, (3, 4))
    source[2, :3] = PAD
    state = model.decoder.start(*model.encoder(source))
    for i in range(3):
        model.decoder(target[:, [i]], state)
    order = torch.tensor([2, 0, 2, 1])
    state.reorder(order)
    found = model.decoder(target[order][:, [3]], state)
    torch.testing.assert_close(found, model(source, target)[order][:, [3]], rtol=1e-11, atol=1e-11)
    with pytest.raises(ValueError, match="one word at a time, got 2 after 4"):
        model.decoder(target[order][:, :2], state)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    model = make(rank_scale=0.5).double().eval()
    source, target = sentences(1), torch.randint(4, 29, (1, 5))
    pads = torch.full((1, 3), PAD)
    padded = torch.cat([pads, source] if side == "left" else [source, pads], 1)
    torch.testing.assert_close(model(padded, target), model(source, target), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(
        model(source, torch.cat([target, pads], 1))[:, :5], model(source, target), rtol=1e-11, atol=1e-11
    )


def test_a_word_sees_no_later_word():
    model = make().double().eval()
    source, target = sentences(1), torch.randint(4, 29, (1, 5))
    other = target.clone()
    other[0, 3] = 4 + (other[0, 3] - 3) % 25
    assert torch.equal(model(source, other)[:, :3], model(source, target)[:, :3])
    assert not torch.equal(model(source, other)[:, 3:], model(source, target)[:, 3:])


@pytest.mark.parametrize("which", ["dropout", "attention_dropout", "activation_dropout"])
def test_each_dropout_is_applied_in_training_only(which):
    none = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    model, source, target = make(**(none | {which: 0.5})), sentences(), torch.randint(4, 29, (3, 4))
    assert not torch.equal(model(source, target), model(source, target))
    model.eval()
    assert torch.equal(model(source, target), model(source, target))
    assert torch.equal(make(**none)(source, target), model(source, target))


@pytest.mark.parametrize(("scale", "head_dim"), [(0, 64), (1, 64), (0.5, 32), (0.25, 16), (0.11, 7), (0.001, 1)])
def test_heads_are_as_wide_as_in_the_released_code(scale, head_dim):
    """int(rank_scale * 256 / 4) dimensions per head, and at least one."""
    assert TransformerConfig(10, 10, rank_scale=scale).head_dim == head_dim


def test_what_is_factorized_and_how_much_that_leaves():
    model = make(rank_scale=0.5)
    factorized = {name for name, m in model.named_modules() if isinstance(m, FactorizedLinear | FactorizedEmbedding)}
    sides = [f"{side}.{name}" for side in ("encoder", "decoder") for name in ("embed_tokens", "embed_positions")]
    layers = [f"{side}.layers.{i}.feed_forward.fc{j}" for side in ("encoder", "decoder") for i in (0, 1) for j in (1, 2)]
    assert factorized == {*sides, *layers, "decoder.out_embed"}
    embeddings = 8 * (23 + 16) + 8 * (29 + 16) + 2 * 8 * (40 + 16) + 8 * (29 + 16) + 29
    attention, feed_forward = 6 * 4 * 8 * 16, 4 * 2 * 8 * (16 + 24)
    norms = (2 * 2 + 2 * 3 + 2) * 2 * 16
    assert count_parameters(model) == model.report.compressed == embeddings + attention + feed_forward + norms
    assert model.report.original == count_full(model.config) == count_parameters(make())


def test_golden_count_of_transformer_small():
    """With vocabularies of 1,000 words: 2 layers, 256 dimensions, 4 heads, feed-forward layers of 1,024."""
    words = 3 * 1000 * 256 + 1000  # three tables of a thousand words and the output's biases
    positions, attention, feed_forward, norms = 2 * 1024 * 256, 6 * 4 * 256 * 256, 4 * 2 * 256 * 1024, 12 * 512
    assert count_full(TransformerConfig(1000, 1000)) == words + positions + attention + feed_forward + norms == 4_969_448


def test_initializations():
    def factors(model):
        return [module.factors() for module in model.modules() if isinstance(module, FactorizedLinear | FactorizedEmbedding)]

    for u, vt in factors(make(rank_scale=0.5, init="spectral").double()):
        torch.testing.assert_close(u.T @ u, vt @ vt.T, rtol=1e-4, atol=1e-5)  # balanced
        assert (u.T @ u - torch.diag((u.T @ u).diagonal())).abs().max() < 1e-5
    norms = [
        [torch.linalg.matrix_norm(u @ vt).item() for u, vt in factors(make(rank_scale=0.5, init=init))]
        for init in ("spectral", "norm-matched", "regular")
    ]
    for spectral, matched, regular in zip(*norms, strict=True):
        assert matched == pytest.approx(spectral, rel=1e-4)
        assert regular != pytest.approx(spectral, rel=0.05)
    plain, balanced = make(), make(spectral_quekey=True)
    for name, attention in attentions(plain).items():
        twin = attentions(balanced)[name]
        assert torch.equal(attention.value.weight, twin.value.weight)
        assert not torch.equal(attention.query.weight, twin.query.weight)


def test_spectral_initialization_is_of_the_layer_that_would_have_been(monkeypatch):
    """The first table is drawn first. With the same draw, it is the truncated SVD of the dense model's table."""
    draw = Transformer._initialize
    monkeypatch.setattr(Transformer, "_initialize", lambda self: (torch.manual_seed(5), draw(self)))
    donor, first = make().encoder.embed_tokens.weight, make(rank_scale=0.5, init="spectral").encoder.embed_tokens
    torch.testing.assert_close(first.to_dense(), compose(spectral_init(donor, 8)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_scale": 1.5}, r"rank_scale must be in \[0, 1\], got 1.5"),
        ({"rank_scale": -0.1}, "got -0.1"),
        ({"heads": 5}, "embed_dim 16 is not divisible by 5 heads"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"init": "xavier", "rank_scale": 0.5}, "got 'xavier'"),
        ({"init": "spectral"}, "needs a rank_scale between 0 and 1"),
        ({"max_positions": 2}, "at least 4, got 2"),
    ],
)
def test_bad_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_a_checkpoint_is_enough_and_is_checked():
    model = make(rank_scale=0.5, init="spectral", spectral_outval=True).eval()
    architecture, weights = asdict(model.config), model.state_dict()
    source, target = sentences(), torch.randint(4, 29, (3, 4))
    assert torch.equal(from_checkpoint(architecture, weights).eval()(source, target), model(source, target))
    with pytest.raises(ValueError, match="has 'depth', which is not known here"):
        from_checkpoint({**architecture, "depth": 3}, weights)
    with pytest.raises(ValueError, match="weights do not fit"):
        from_checkpoint({**architecture, "layers": 3}, weights)
    with pytest.raises(ValueError, match="weights do not fit"):
        from_checkpoint(architecture, {})


@pytest.mark.parametrize("lenpen", [0.0, 1.0, 2.0])
def test_a_wide_beam_finds_the_best_of_all_translations(lenpen):
    """Compared with the scores of every possible translation of at most three words, each from one full pass."""
    model = make(target_words=7, seed=3).eval()
    with torch.no_grad():
        model.decoder.out_embed.weight.mul_(3)
    source = sentences(2)
    source[0, :2] = PAD
    found = search(model, source, beam=400, lenpen=lenpen, max_words=3)
    for row, (words, score) in enumerate(found):
        every = [list(w) for n in (1, 2, 3) for w in itertools.product([0, 3, 4, 5, 6], repeat=n)]
        scores = {}
        for candidate in every:
            steps = model(source[row : row + 1], torch.tensor([[EOS, *candidate]]))[0].log_softmax(-1)
            total = sum(steps[i, word].item() for i, word in enumerate([*candidate, EOS]))
            scores[tuple(candidate)] = total / (len(candidate) + 1) ** lenpen
        best = max(scores, key=scores.get)
        assert (tuple(words), pytest.approx(scores[best], abs=1e-4)) == (best, score)


def test_a_sentence_is_translated_alike_in_any_company():
    model = make(seed=1).eval()
    source = sentences(5)
    for row in range(1, 5):
        source[row, :row] = PAD
    limits = [12, 3, 12, 7, 1]
    together = search(model, source, beam=3, max_words=limits)
    for row, ((words, score), limit) in enumerate(zip(together, limits, strict=True)):
        alone = search(model, source[row : row + 1, row:], beam=3, max_words=limit)[0]
        assert (alone[0], pytest.approx(alone[1], abs=1e-4)) == (words, score)
        assert len(words) <= limit
    assert max(len(words) for words, _ in together) > 7


# ---- text


@pytest.fixture(scope="module")
def pipeline():
    lines = ["ein haus & zwei häuser", "the house 's two houses"] * 3
    return Pipeline("de", "en", True, learn_codes(lines, 20))


def test_text_there_and_back(pipeline):
    line = "The house's  two Houses, (5.3 % of) them\tall!"
    tokenized = pipeline.tokenize(line, "en")
    assert tokenized == "the house &apos;s two houses , ( 5.3 % of ) them all !"
    subwords = pipeline.split(tokenized)
    assert any(word.endswith("@@") for word in subwords)
    assert pipeline.join(subwords) == tokenized
    assert pipeline.detokenize(tokenized, "en") == "the house's two houses, (5.3% of) them all!"


@pytest.mark.parametrize(
    "line", ["", "   ", "\0\x01\x1c", "a\u2028b\x85c", "😀 ẞ \u202e", "@@ a@@ @@", "&amp; <s> </s> <pad>", "x" * 5000]
)
def test_odd_text_stays_one_line_and_loses_no_word(pipeline, line):
    tokenized = pipeline.tokenize(line, "de")
    assert len(tokenized.splitlines()) <= 1
    assert pipeline.join(pipeline.split(tokenized)).replace("@@", "") == tokenized.replace("@@ ", "").replace("@@", "").strip()


def test_vocabularies(tmp_path):
    (tmp_path / "dict").write_text("haus 5\nmaus 3\n# 2\n")
    vocabulary = Vocabulary.load(tmp_path / "dict")
    assert vocabulary.encode(["maus", "laus", "#"]) == [5, 3, 6, EOS]
    assert vocabulary.decode([0, 5, PAD, 3, 6, EOS]) == ["maus", "<unk>", "#"]
    (tmp_path / "dict").write_text("haus 5\nmaus\n")
    with pytest.raises(ValueError, match="line 2, is not a word and its count: 'maus'"):
        Vocabulary.load(tmp_path / "dict")
    with pytest.raises(ValueError, match="there is no dictionary at"):
        Vocabulary.load(tmp_path / "none")


# ---- corpora


def test_numbers_are_right_distinct_and_the_same_each_time():
    splits = corpora.numbers(0, train=600, held_out=50)
    assert {name: len(pairs) for name, pairs in splits.items()} == {"train": 600, "valid": 50, "test": 50}
    sources = [german for pairs in splits.values() for german, _ in pairs]
    assert len(set(sources)) == 700
    assert corpora.numbers(0, train=600, held_out=50) == splits != corpora.numbers(1, train=600, held_out=50)
    every = dict(corpora.numbers(0, train=6_000, held_out=50)["train"])
    tens = {"zwanzig": "twenty", "dreißig": "thirty", "vierzig": "forty", "neunzig": "ninety"}
    ones = {"ein": "one", "zwei": "two", "drei": "three", "sieben": "seven", "neun": "nine"}
    hundreds = {"": "", "hundert": " hundred and "}
    known = {
        f"{h}{hundred}{o}und{t}": f"{ones.get(h, '')}{english}{tens[t]}-{ones[o]}"
        for hundred, english in hundreds.items()
        for h, o, t in itertools.product(ones if hundred else [""], ones, tens)
    }
    found = {german: every[german] for german in known if german in every}
    assert len(found) > 3
    assert found == {german: known[german] for german in found}


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def test_pairs_of_files_plain_and_compressed(tmp_path):
    write(tmp_path / "a.de", "eins\r\n\nzwei drei\n")
    write(tmp_path / "a.en.gz", "one\n\ntwo three\n")
    assert corpora.read_pair(tmp_path / "a", "de", "en") == [("eins", "one"), ("zwei drei", "two three")]


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("", "one\n", "x.de is empty"),
        ("eins\nzwei\n", "one\n", "x.de has 2 lines and .*x.en has 1: line 2 is the first without"),
        ("eins\n \ndrei\n", "one\ntwo\nthree\n", "x.de, line 2, is empty and its translation is not"),
        ("\n\n", "\n\n", "only empty lines"),
        (None, "one\n", "there is no .*x.de and no x.de.gz beside it"),
        (b"eins\nz\xffwei\n", "one\ntwo\n", "x.de, line 2, is not UTF-8"),
    ],
)
def test_bad_files_name_the_line(tmp_path, source, target, message):
    if source is not None:
        (tmp_path / "x.de").write_bytes(source if isinstance(source, bytes) else source.encode())
    write(tmp_path / "x.en", target)
    with pytest.raises(ValueError, match=message):
        corpora.read_pair(tmp_path / "x", "de", "en")


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ("eins\nzwei\n", ["eins", "zwei"]),
        ("eins\r\nzwei\r\n", ["eins", "zwei"]),
        ("eins\rzwei\r", ["eins", "zwei"]),
        ("eins\r\rzwei", ["eins", "", "zwei"]),
        ("eins\rzwei\r\n", ["eins", "zwei"]),
        ("ei\rns\nzwei\n", ["ei\rns", "zwei"]),  # within a line of a file with other line ends
        ("\ufeffeins\nzwei\n", ["eins", "zwei"]),
        ("eins\n\ufeffzwei\n", ["eins", "zwei"]),  # two joined files
        ("\n", [""]),
        ("", []),
    ],
)
def test_line_ends_of_all_systems_and_byte_order_marks(tmp_path, content, lines):
    (tmp_path / "x").write_bytes(content.encode())
    assert corpora.read_lines(tmp_path / "x") == lines


def test_a_broken_gzip_file_is_named(tmp_path):
    (tmp_path / "x.de.gz").write_bytes(gzip.compress(b"eins\n" * 100)[:-9])
    with pytest.raises(ValueError, match=r"x.de.gz is not a complete gzip file"):
        corpora.read_lines(tmp_path / "x.de")


def iwslt_archive(path, talks=60, leave_out=None, english_talks=60):
    """An archive in the format of IWSLT'14, with a few made-up sentences."""
    files = {}
    for lang, word in (("de", "Satz"), ("en", "Sentence")):
        count = talks if lang == "de" else english_talks
        lines = ["<url>http://x</url>", f"<title>{word} \u2028zero</title>", "<keywords>a, b</keywords>"]
        files[f"train.tags.de-en.{lang}"] = [
            *lines,
            *(f"{word} {i} ." for i in range(1, count)),
        ]
        for part in corpora._IWSLT_TESTS:
            files[f"IWSLT14.{part}.de-en.{lang}.xml"] = ["<doc>", f'<seg id="1"> {word} \u2019{part} </seg>', "</doc>"]
    with tarfile.open(path, "w:gz") as archive:
        for name, lines in files.items():
            if name != leave_out:
                content = "\n".join(lines).encode()
                member = tarfile.TarInfo(f"de-en/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def test_iwslt_is_split_as_in_the_released_code(tmp_path):
    iwslt_archive(tmp_path / "de-en.tgz")
    splits, sha256 = corpora.iwslt14(tmp_path)
    assert splits["train"][:2] == [("Satz \u2028zero", "Sentence \u2028zero"), ("Satz 1 .", "Sentence 1 .")]
    assert len(splits["train"]) == 60
    assert [target for _, target in splits["test"]][:2] == ["Sentence 'TED.dev2010", "Sentence 'TEDX.dev2012"]
    train, valid = prepare.split_off(splits["train"])
    assert valid == [splits["train"][22], splits["train"][45]]
    assert len(train) == 58
    assert corpora.iwslt14(tmp_path, sha256.upper())[1] == sha256
    with pytest.raises(ValueError, match=f"has SHA-256 {sha256}, expected 00"):
        corpora.iwslt14(tmp_path, "00")


def test_an_archive_that_is_damaged_or_another_is_named(tmp_path):
    iwslt_archive(tmp_path / "de-en.tgz", leave_out="train.tags.de-en.en")
    with pytest.raises(ValueError, match=r"lacks train.tags.de-en.en"):
        corpora.iwslt14(tmp_path)
    iwslt_archive(tmp_path / "de-en.tgz", english_talks=59)
    with pytest.raises(ValueError, match=r"train.tags.de-en.de has 60 sentences, the English file 59"):
        corpora.iwslt14(tmp_path)
    iwslt_archive(tmp_path / "de-en.tgz")
    content = bytearray((tmp_path / "de-en.tgz").read_bytes())
    for position in range(20, len(content) - 8, 60):
        flipped = content.copy()
        flipped[position] ^= 16
        (tmp_path / "de-en.tgz").write_bytes(flipped)
        with pytest.raises(ValueError, match=r"is damaged|lacks|sentences, the English file"):
            corpora.iwslt14(tmp_path)
    (tmp_path / "de-en.tgz").write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="is damaged"):
        corpora.iwslt14(tmp_path)


@pytest.mark.parametrize("lines", [["guten tag", "good day"], ["a", "b"]])
def test_text_without_a_repeated_pair_of_letters_is_too_little_for_subwords(lines):
    with pytest.raises(ValueError, match="too little text to learn subwords"):
        learn_codes(lines, 30)


def test_download_from_a_server(tmp_path, monkeypatch):
    iwslt_archive(tmp_path / "de-en.tgz")
    content = (tmp_path / "de-en.tgz").read_bytes()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(corpora, "IWSLT_URL", f"http://127.0.0.1:{server.server_port}/de-en.tgz")
    with pytest.raises(OSError, match=f"got {len(content):,} bytes, expected 19,982,877"):
        corpora.iwslt14(tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []
    monkeypatch.setattr(corpora, "IWSLT_BYTES", len(content))
    assert len(corpora.iwslt14(tmp_path / "data")[0]["train"]) == 60
    server.shutdown()
    monkeypatch.setattr(corpora, "IWSLT_URL", "http://127.0.0.1:9/de-en.tgz")
    with pytest.raises(OSError, match=r"could not be downloaded .* download .* to .* --corpus numbers"):
        corpora.iwslt14(tmp_path / "offline")


def test_cleaning_keeps_short_pairs_of_similar_length():
    def words(n):
        return " ".join(["w"] * n)

    lengths = [(1, 1), (2, 3), (3, 2), (2, 4), (0, 1), (175, 175), (176, 176), (100, 151), (100, 150)]
    kept = prepare.clean([(words(a), words(b)) for a, b in lengths])
    assert [(len(a.split()), len(b.split())) for a, b in kept] == [(1, 1), (2, 3), (3, 2), (175, 175), (100, 150)]
