"""Spec-Bench with n-grams, in ten lines: python examples/spec_bench.py MODEL.gguf QUESTIONS.jsonl."""

import sys

from blockffn.eval.spec_bench.questions import read_questions
from blockffn.eval.spec_bench.report import summarize, table
from blockffn.eval.spec_bench.session import Session, Settings

session = Session(Settings(sys.argv[1], draft="ngram", max_tokens=32, plain=True))
records = {question.id: session.answer(question) for question in read_questions(sys.argv[2])}
print(table(summarize(records)))
session.close()
