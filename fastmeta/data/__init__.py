"""Episodes: samplers, task distributions, augmentation.

A sampler makes few-shot tasks out of labelled data; a batch of tasks is an :class:`Episode`, which
unpacks to the four tensors that learners take.

Example:
    >>> import torch
    >>> from fastmeta.data import EpisodeSampler, pixel_floor
    >>> images = torch.randint(0, 256, (200, 1, 28, 28), dtype=torch.uint8)
    >>> labels = torch.arange(200) % 20
    >>> sampler = EpisodeSampler(images, labels, ways=5, shots=1, queries=3, tasks=4, batches=2)
    >>> for episode in sampler:
    ...     support_x, support_y, query_x, query_y = episode
    ...     print(support_x.shape, query_y.shape, pixel_floor(episode).shape)
    torch.Size([4, 5, 1, 28, 28]) torch.Size([4, 15]) torch.Size([4])
    torch.Size([4, 5, 1, 28, 28]) torch.Size([4, 15]) torch.Size([4])

With the glyph data set and augmentation, ``EpisodeSampler(glyphs("train"), shots=1, queries=5,
transform=Augment(), workers=1)`` is an endless stream to train on.

================================  ==================================================================
:class:`Episode`                  a batch of tasks: support and query, padded where they are ragged
:class:`EpisodeSampler`           tasks out of labelled arrays, images or torch datasets
:class:`EpisodeStream`            the base of all streams: seeds, workers, resuming
:class:`Augment`                  affine, elastic and stroke changes of images
:class:`LabelledImages`           what the data sets below return
:func:`glyphs`                    characters of matplotlib's fonts (no download)
:func:`digits`, :func:`mnist`     handwritten digits: scikit-learn's and MNIST's
:func:`omniglot`                  Omniglot; :func:`omniglot_runs`: its 20 official one-shot runs
:func:`sinusoids`                 regression tasks
:func:`pixel_floor`               accuracy of nearest neighbour on raw pixels
================================  ==================================================================

Folders: ``FASTMETA_DATA`` names the folder of data sets that are not made here, ``FASTMETA_CACHE``
    the
one for what is made once and kept.
"""

from fastmeta.data.augment import Augment as Augment
from fastmeta.data.digits import digits as digits
from fastmeta.data.digits import mnist as mnist
from fastmeta.data.episode import Episode as Episode
from fastmeta.data.episode import collate_episodes as collate_episodes
from fastmeta.data.floor import nearest_pixels as nearest_pixels
from fastmeta.data.floor import pixel_floor as pixel_floor
from fastmeta.data.glyphs import glyphs as glyphs
from fastmeta.data.images import LabelledImages as LabelledImages
from fastmeta.data.omniglot import omniglot as omniglot
from fastmeta.data.omniglot import omniglot_runs as omniglot_runs
from fastmeta.data.sampler import BatchTransform as BatchTransform
from fastmeta.data.sampler import EpisodeSampler as EpisodeSampler
from fastmeta.data.sinusoids import Sinusoids as Sinusoids
from fastmeta.data.sinusoids import sinusoids as sinusoids
from fastmeta.data.stream import EpisodeStream as EpisodeStream
from fastmeta.data.stream import task_generator as task_generator
