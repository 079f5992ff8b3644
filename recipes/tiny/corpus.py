from pathlib import Path
import numpy as np, torch
from fish_speech.conversation import Utterance
from recipes.tiny.speech import BLOCK, speaker_of
def read_corpus(cache):
    C=Path('/var/tmp/tiny-cache')
    T=(C/'train.txt').read_text().splitlines(); items=[]
    for p in sorted((C/'codes').glob('0*.npz')):
        z=np.load(p); b=int(p.stem)*BLOCK
        for i,c in enumerate(np.split(z['codes'],np.cumsum(z['lengths'])[:-1],1)): items.append((speaker_of(b+i),Utterance(T[b+i],torch.from_numpy(c))))
    return items
