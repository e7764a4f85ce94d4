"""The open image: where bytes are, how writes change that, in which order it reaches the disk.

Made in layers.  Each stands on the one before it, in a module of its own, and is read without those
behind it.  An image that is only read ends with ``Image``:

==================================  =============================================================
`core.Core`                         geometry, the tables kept in memory, what of them is dirty
`overlap.Guard`                     which places hold metadata, so that nothing is written there
`mapping.Mapping`                   guest to host: L1, L2, and shortcuts for columns
`submapping.SubMapping`             the same where entries tell of 32 subclusters
`external.External`                 guest data in a file of their own
`encrypted.Encrypted`               a cipher on what the map names
`..image.Image`                     what an image tells of itself, and its procedures
==================================  =============================================================

One that is open for writing goes on to ``Qcow2``:

==================================  =============================================================
`alloc.Allocator`                   host clusters: found, counted, given back (on `Mapping`)
`reserve.Reserver`                  L2 tables to write to, and what must be durable before (on
                                    `Allocator` and `Encrypted`)
`zeroing.Zeroing`                   plans of zeroes and discards
`packing.Packing`                   plans of compressed clusters
`planning.Planner`                  plans of data; ``plan``, ``commit``, ``abort`` of the contract
`bulk.Bulk`                         plans of many new clusters at once
`subzeroing.SubZeroing`             zeroes and discards by subcluster
`subplanning.Subclusters`           data by subcluster
`writeback.Writeback`               ``freeze``, ``settle``, ``release``; closing
`externalplanning.ExternalPlanner`  plans of guest data in a file of their own
`subexternal.SubExternal`           the same by subcluster
`encryptedplanning.EncryptedPlanner`  a cipher on what the plans name
`..format.Qcow2`                    all of it (on `Image`, too)
==================================  =============================================================

Up to `Mapping`, from `Allocator` to `Bulk`, and in `Writeback` stands what every image needs.  The
other layers are features: each overrides a few methods and hands images without the feature on with
``super()``, so that the layers below need to know little of it (`Core` says how wide an entry is
and in which slot guest data are, `Mapping` which lookup is the right one).  These are the methods:
``map_wide`` and ``_wide_extent`` (what `SubMapping` fills in), ``_shortcut``, ``_words``,
``_extent`` and ``place_of`` (lookup), ``choose`` and ``take`` (new clusters), ``plan`` and
``_plan_*``, ``new_entries`` (what entries of new clusters say), ``pack_codec`` and ``zeroes`` (what
zeroes are, as stored).

`refblock` and `runs` are what the layers keep: counts of any width, and sets of clusters.
"""
