"""Make the toy laboratory's tokenizer and base model:  python -m plw_mlflow.toy --output DIR"""

from plw_mlflow.toy.pretraining import main

main()
