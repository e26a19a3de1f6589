"""The quickstart's corpus, made on this machine, and the scorer of the models that learned from it.

python -m scripts.quickstart.make_data --out data/quickstart
python -m scripts.quickstart.score --model runs/quickstart/sft/final
"""
