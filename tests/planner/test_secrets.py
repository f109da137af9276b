"""Secrets are told from other words, put in where they are needed, and struck out everywhere else."""

from __future__ import annotations

import io

import pytest

from finetui.engine.supervision.redacted import RedactedStream
from finetui.planner.errors import UserError
from finetui.planner.secrets import conceal, expand, is_secret, redact, secret_in, without_secrets

TOKEN = "hf_" + "a1" * 16


@pytest.mark.parametrize(
    "text",
    [
        TOKEN, f"https://hf.co/x?a=1&token={TOKEN}", "https://u:p@host/x", "https://abcdef@host/x", "s3://k:s@b/x",
        "https://h/x?X-Amz-Signature=1f", "https://h/x?sig=ab%2F", "https://h/x?access_token=1", "ghp_" + "a" * 36,
        "sk-" + "a" * 40, "AKIA" + "A" * 16,
    ],
)  # fmt: skip
def test_secrets_are_seen_and_struck_out(text: str) -> None:
    assert secret_in(text)
    assert not secret_in(redact(text, {}).replace("***", ""))
    assert redact(text, {}) != text


@pytest.mark.parametrize(
    "text",
    [
        "https://host/x?token=${TOKEN}", "https://${USER}:${PW}@host/x", "abfs://container@account/x", "token=abc",
        "./a:b@c.jsonl", "s3://bucket/key=1/x.jsonl", "https://h/x?split=train", "hf_short", "org/sk-model",
        "what is a password? tokens: 5", "git@github.com:a/b", "memory://a@b", "AKIA",
    ],
)  # fmt: skip
def test_other_words_stay(text: str) -> None:
    assert secret_in(text) == ""
    assert redact(text, {}) == text


def test_secrets_of_the_environment_are_struck_out_however_they_are_written() -> None:
    environment = {
        "MY_API_KEY": "a/b c+d",
        "TOKENIZERS_PARALLELISM": "falsefalse",
        "HOME": "/home/someone",
        "PASSWD": "x",
    }
    told = redact("key a/b c+d, a%2Fb%20c%2Bd; falsefalse /home/someone x", environment)
    assert told == "key ***, ***; falsefalse /home/someone x"
    assert redact("Authorization: Bearer abcdefghijklmnop", {}) == "Authorization: Bearer ***"


def test_values_are_put_in_and_taken_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    address = "https://host/x?word=${SESAME}"
    monkeypatch.delenv("SESAME", raising=False)
    with pytest.raises(UserError, match="the environment has no SESAME"):
        expand(address)
    monkeypatch.setenv("SESAME", "open/now")
    assert expand(address) == "https://host/x?word=open/now"
    assert conceal("404 of https://host/x?word=open%2Fnow (open/now)", address).count("${SESAME}") == 2
    assert is_secret("SESAME")
    assert redact("open/now") == "***"


def test_what_an_untrusted_process_gets() -> None:
    given = {
        "HF_TOKEN": "hf_secret",
        "PATH": "/bin",
        "URL": "https://u:hf_secret@h",
        "JUDGE_KEY": "k",
        "OPENAI_API_KEY": "o",
    }
    assert without_secrets(given, keep=("OPENAI_API_KEY",)) == {
        "PATH": "/bin", "URL": "https://***@h", "JUDGE_KEY": "k", "OPENAI_API_KEY": "o"
    }  # fmt: skip


def test_a_stream_holds_a_line_until_it_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_in_pieces")
    behind = io.StringIO()
    stream = RedactedStream(behind)
    for piece in ("a ", "hf_in", "_pieces", "\nb hf_in_pie", "ces"):
        stream.write(piece)
    assert behind.getvalue() == "a ***\n"
    stream.flush()
    assert behind.getvalue() == "a ***\nb ***"
