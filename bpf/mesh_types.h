/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Every structure and number that user space shares with the programs. The Python layout is
 * generated from the BTF of these (pykmesh/kernel/btf.py): field names here are field names there.
 *
 * Fixed widths, explicit zeroed padding, big-endian types for network order. Values that may grow
 * end in 16 reserved bytes: a new field there changes no size.
 */
#pragma once

#include <linux/types.h>

/* An address of either family: IPv4 is ::ffff:a.b.c.d, so one key serves both and v4-mapped sockets. */
struct ip {
	__be32 word[4];
};

/* What is reached at (network, address, port). */
struct service_key {
	struct ip address;
	__u32 network; /* id of the network's name, 0 for "" */
	__be16 port;
	__u16 pad;
};

/*
 * One port of one service, as seen by one address family. Changed by one update, so a connection
 * sees the list of endpoints before the change or after it.
 *
 * It begins with its key: an element of a hash may be reused for another key while a program still
 * reads it (kernel 6.1 and later, at once), values are copied from their beginning on, and what is
 * read last is the beginning. A program that finds another key there looks again.
 */
struct service_value {
	struct ip address;
	__u32 network;
	__be16 port;
	__u16 pad;
	__u64 id;	  /* service port id: hash of (service, port, family) */
	__u32 endpoints;  /* slots 0..endpoints-1 of `endpoints` may be chosen */
	__u16 verdict;	  /* enum reason: REASON_ROUTED, REASON_PASSTHROUGH, or why it is refused */
	__u16 flags;	  /* enum service_flag */
	__u32 affinity_s; /* a client keeps its endpoint for so long after its last connection; 0: it does not
			   */
	__u8 reserved[4];
};

enum service_flag {
	SERVICE_LEAST_CONNECTIONS = 1, /* of two draws the endpoint with fewer open connections */
	SERVICE_WAYPOINT = 2,	       /* the endpoints are a waypoint's instances */
};

struct endpoint_key {
	__u64 service; /* service_value.id */
	__u32 slot;
	__u32 pad;
};

/*
 * `service` repeats the key, for the same reason. Slots of one list may be taken for one another.
 *
 * Of endpoints with different weights each slot gives way to another one (Vose's alias method): of
 * 2^32 connections that draw the slot, `share` stay and the others go to slot `other`. 0: all stay.
 */
struct endpoint_value {
	__u64 service;
	struct ip address;
	__be16 port;
	__u16 pad;
	__u32 other;
	__u32 share;
	__u8 reserved[12];
};

struct address_key {
	struct ip address;
	__u32 network;
	__u32 pad;
};

enum address_kind {
	ADDRESS_SERVICE = 1,
	ADDRESS_WORKLOAD = 2,
};

/* What an address is, consulted when (address, port) is no service port. Begins with its key. */
struct address_value {
	struct ip address;
	__u32 network;
	__u32 pad;
	__u16 kind;    /* enum address_kind */
	__u16 verdict; /* enum reason, for connections to the address itself */
	__u32 view; /* of a workload: the network in which its namespace sees services of its own; 0: none */
	__u8 reserved[8];
};

/* Index into `switches`: what nobody needs to look for while it is 0. */
enum switch_index {
	SWITCH_VIEWS = 0, /* some namespace sees a service that others do not */
	SWITCH_COUNT,
};

/* A range of addresses that is one service's, in the order in which a trie compares: longest prefix. */
struct range_key {
	__u32 prefix_bits; /* of the network and the address together: 32 to 160 */
	__u32 network;
	struct ip address;
};

/* Where `services` and `addresses` say what a range is: its first address, in a network of its own. */
struct range_value {
	struct ip address;
	__u32 network;
	__u32 pad;
	__u8 reserved[8];
};

/* Who a client is: a socket has no source address yet in connect(), but its namespace has a cookie. */
struct pod_key {
	__u64 netns_cookie;
};

struct pod_value {
	struct ip address4; /* zero when it has none */
	struct ip address6;
	__u32 network;
	__u32 pad;
	__u64 cgroup_id; /* of the enrolled cgroup, for clean-up and display */
	__u8 reserved[16];
};

/* A datagram socket's way to a service (is_reply 0: key names the service) and back (is_reply 1). */
struct datagram_key {
	__u64 socket_cookie;
	struct ip address;
	__be16 port;
	__u16 is_reply;
	__u32 pad;
};

struct datagram_value {
	__u64 service;
	struct ip address;
	__be16 port;
	__u16 pad;
	__u32 slot;
};

/* Kept with each socket of an enrolled pod. */
struct socket_state {
	__u64 service; /* 0: not by way of a service */
	__u64 opened_ns;
	struct ip vip;
	struct ip endpoint;
	__be16 vip_port;
	__be16 endpoint_port;
	__u8 direction; /* enum direction, 0 until the connection is under way */
	__u8 established;
	__u8 balanced;	    /* enum balanced */
	__u8 handed_over;   /* 1: the endpoint is a waypoint's instance, which is told what was asked for */
	__u64 netns_cookie; /* of the client, where the connection is handed over */
};

/* Whether a socket counts among the open connections of its endpoint. */
enum balanced {
	BALANCED_NOT = 0,
	BALANCED_WANTED = 1,
	BALANCED_COUNTED = 2,
};

/* A connection to a waypoint's instance, as both its ends see it. */
struct handoff_key {
	struct ip client;
	struct ip waypoint;
	__be16 client_port;
	__be16 waypoint_port;
	__u32 pad;
};

/*
 * Who an enrolled pod is, as map_writer numbers it: keyed hashes, which nobody else can make. All zero: it is
 * not known. Begins with its key, as `services` do.
 */
struct identity_value {
	__u64 netns_cookie;
	__u8 namespace_id[5];
	__u8 account_id[5]; /* of namespace and service account together */
	__u8 reserved[6];
};

struct identity_secret {
	__u8 bytes[32];
};

/* What IPv6 services' addresses are hashed with, for waypoints. */
struct service_secret {
	__u64 word[5];
};

/* What the client asked for, and who it is. */
struct handoff_value {
	__u32 service;	/* the address itself, or a keyed hash of it */
	__u32 sequence; /* with which the client's SYN begins: of this connection, and no other of these ports
			 */
	__be16 prefix;	/* enum handoff_prefix */
	__be16 port;
	__u8 client_namespace[5];
	__u8 client_account[5];
	__u8 reserved[10];
};

/* With which what is told to waypoints of other nodes is sealed: the same on all nodes. */
struct handoff_secret {
	__u64 key[2];
	__u32 is_set;
	__u32 pad;
};

/* A TCP option: kind, length, 16 bits that say what it is (enum handoff_prefix), and what is told. */
struct handoff_option {
	__u8 kind;
	__u8 length;
	__be16 prefix;
	__u8 sealed[16];
};

/*
 * The address that a waypoint is told of a connection: the service's, and who the client is. It begins with
 * HANDOFF_IPV4 and the address itself, or HANDOFF_IPV6 and a keyed hash of it.
 */
enum handoff_prefix {
	HANDOFF_IPV4 = 0xfd4d,
	HANDOFF_IPV6 = 0xfd4e,
};

/* Where connections to a waypoint come in on its own node. */
struct front_key {
	struct ip address;
	__u32 port;
};

#define FRONT_INSTANCES_MAX 32 /* a power of two */

/* The instances that take them, by the ports that they listen at. */
struct front_value {
	__u32 count;
	__u16 ports[FRONT_INSTANCES_MAX];
};

/* Who is connected to, of what is known for a while: open connections, and refused ones. */
struct peer_key {
	struct ip address;
	__be16 port;
	__u16 pad;
	__u32 pad2;
};

/* Whom a client's connections to a service port go to. */
struct affinity_key {
	__u64 netns_cookie;
	__u64 service;
};

struct affinity_value {
	__u64 used_ns;
	struct ip address;
	__be16 port;
	__u16 pad;
	__u32 slot;
};

enum dns_limit {
	/* Servers of names that a network namespace may ask by way of the proxy, of both families. */
	DNS_SLOTS = 8,
	/* A proxy that has said nothing for so long, in milliseconds, is not asked. */
	DNS_SILENCE_MS = 1000,
};

struct dns_key {
	__u64 netns_cookie;
	__u32 slot;
	__u32 pad;
};

/* Where the proxy listens in a network namespace, on 127.0.0.1 or ::1, UDP and TCP. */
struct dns_listener {
	__u64 beat_ns; /* CLOCK_MONOTONIC, when the proxy was last well */
	__be16 port;
	__u16 is_6; /* 1: for servers with IPv6 addresses, on ::1 */
	__u32 pad;
	__u8 reserved[8];
};

/* Whom the questions to a slot's ports are meant for. */
struct dns_server {
	struct ip address;
};

enum direction {
	DIRECTION_OUTBOUND = 1,
	DIRECTION_INBOUND = 2,
};

/* Connections opened, counted here and never sent one by one. */
struct open_key {
	struct ip local;
	struct ip remote;
	__u64 service;
	__u8 direction;
	__u8 protocol;
	__u16 pad;
	__u32 pad2;
};

enum flow_kind {
	FLOW_CLOSED = 1,
	FLOW_REFUSED = 2,
};

/* One for each socket at its close, and one for each refused connect or datagram. */
struct flow_record {
	__u64 opened_ns; /* CLOCK_MONOTONIC */
	__u64 closed_ns;
	__u64 service;
	__u64 sent_bytes;     /* payload, without retransmissions */
	__u64 received_bytes; /* payload */
	struct ip local;
	struct ip remote; /* the endpoint; for a refusal the address asked for */
	struct ip vip;
	__be16 local_port;
	__be16 remote_port;
	__be16 vip_port;
	__u16 reason; /* enum reason */
	__u8 kind;    /* enum flow_kind */
	__u8 direction;
	__u8 protocol; /* IPPROTO_TCP or IPPROTO_UDP */
	__u8 established;
	__u32 error; /* sk_err at the close, 0 for an orderly one */
	__u32 srtt_us;
	__u32 retransmits;
	__u8 reserved[16];
};

/*
 * Why a program decided as it did: the number in `verdict` and `reason`, and the index into
 * `counters`. User space shows the names in lower case, without the prefix.
 */
enum reason {
	REASON_ROUTED = 0,	     /* sent to an endpoint */
	REASON_PASSTHROUGH,	     /* the service asks for its traffic to be left alone */
	REASON_NO_ENDPOINT,	     /* refused: the service has no usable endpoint */
	REASON_NO_PORT,		     /* refused: the service has no such port */
	REASON_WAYPOINT_UNSUPPORTED, /* refused: must go by way of a waypoint that takes nothing but HBONE */
	REASON_POLICY_UNSUPPORTED,   /* refused: has policies, which are not enforced yet */
	REASON_FAMILY,		     /* refused: the endpoints have no address of the socket's family */
	REASON_ENDPOINT_VANISHED,    /* refused: the endpoints changed faster than they could be read */
	REASON_STATE_LOST,    /* not refused: no memory for the socket's state, so no name and record */
	REASON_RECORD_LOST,   /* not refused: the ring was full, a record is missing */
	REASON_OPEN_LOST,     /* not refused: the open was not counted */
	REASON_DATAGRAM_LOST, /* refused: no room to remember the way back */
	REASON_NO_ROOM,	      /* refused: the maps have no room for a port of the service, or its endpoints */
	REASON_SHUNNED,	      /* not refused: another endpoint was drawn for one that refused a connection */
	REASON_WAYPOINT_UNAVAILABLE, /* refused: its waypoint is unknown, or has no instance */
	REASON_HANDOFF_UNKNOWN,	     /* refused: nothing is noted of a connection that a waypoint accepted */
	REASON_COUNT,
};

_Static_assert(sizeof(struct service_key) == 24, "service_key");
_Static_assert(sizeof(struct service_value) == 48, "service_value");
_Static_assert(sizeof(struct endpoint_key) == 16, "endpoint_key");
_Static_assert(sizeof(struct endpoint_value) == 48, "endpoint_value");
_Static_assert(sizeof(struct address_key) == 24, "address_key");
_Static_assert(sizeof(struct address_value) == 40, "address_value");
_Static_assert(sizeof(struct range_key) == 24, "range_key");
_Static_assert(sizeof(struct range_value) == 32, "range_value");
_Static_assert(sizeof(struct pod_value) == 64, "pod_value");
_Static_assert(sizeof(struct datagram_key) == 32, "datagram_key");
_Static_assert(sizeof(struct datagram_value) == 32, "datagram_value");
_Static_assert(sizeof(struct peer_key) == 24, "peer_key");
_Static_assert(sizeof(struct handoff_key) == 40, "handoff_key");
_Static_assert(sizeof(struct handoff_value) == 32, "handoff_value");
_Static_assert(sizeof(struct handoff_secret) == 24, "handoff_secret");
_Static_assert(sizeof(struct handoff_option) == 20, "handoff_option");
_Static_assert(sizeof(struct identity_value) == 24, "identity_value");
_Static_assert(sizeof(struct front_key) == 20, "front_key");
_Static_assert(sizeof(struct front_value) == 68, "front_value");
_Static_assert(sizeof(struct affinity_value) == 32, "affinity_value");
_Static_assert(sizeof(struct dns_key) == 16, "dns_key");
_Static_assert(sizeof(struct dns_listener) == 24, "dns_listener");
_Static_assert(sizeof(struct open_key) == 48, "open_key");
_Static_assert(sizeof(struct flow_record) == 128, "flow_record");
