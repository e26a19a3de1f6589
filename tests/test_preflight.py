"""A run that cannot work is refused before its data is prepared, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import tiny_model

from minimoe.config import PretrainRun
from minimoe.errors import UserError
from minimoe.train import pretrain
from minimoe.train.preflight import check_run


def test_each_process_needs_a_row(pretrain_config, tiny_tokenizer):
    config, model = pretrain_config(batch_size=4), tiny_model(vocab_size=448)
    check_run(config, model, tiny_tokenizer, "cpu", num_processes=4)
    with pytest.raises(UserError, match="batch_size 4 is less than one row for each of the 5 processes"):
        check_run(config, model, tiny_tokenizer, "cpu", num_processes=5)


def test_rows_fit_the_positions_of_the_model(pretrain_config, tiny_tokenizer):
    check_run(pretrain_config(), tiny_model(vocab_size=448, max_position_embeddings=32), tiny_tokenizer, "cpu", 1)
    with pytest.raises(UserError, match=r"sequence_length 32 is more than model\.max_position_embeddings 31"):
        check_run(pretrain_config(), tiny_model(vocab_size=448, max_position_embeddings=31), tiny_tokenizer, "cpu", 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"sample_prompts": ["The cat " * 40]}}, "the prompt has"),
        ({"model": {"vocab_size": 64}}, "smaller than the tokenizer's"),
    ],
)
def test_a_refused_run_has_read_no_data_and_made_no_folder(pretrain_config, changes, message):
    config = pretrain_config()
    values = config.model_dump(mode="json")
    for section, change in changes.items():
        values[section] |= change
    values["data"]["train"] = [{"path": "nowhere.txt"}]
    with pytest.raises(UserError, match=message):
        pretrain.run(PretrainRun.model_validate(values))
    assert not Path(config.output_dir).exists()
